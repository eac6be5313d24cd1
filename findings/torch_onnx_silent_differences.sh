#!/usr/bin/env bash
# PyTorch's ONNX exporter and ONNX Runtime give other numbers than PyTorch on valid inputs, without an error.
#
# Seen with torch 2.13.0 (dynamo exporter, opset 20), onnxscript 0.7.2, onnxruntime 1.31.1, CPU, Python 3.11:
#
#   what                                        torch              exported, in ONNX Runtime
#   logaddexp of 100 and 100                    100.69             inf: log(exp(a) + exp(b))
#   logsigmoid of -200                          -200               -inf: log(sigmoid(x))
#   scatter_reduce "mean" of 1, 1, 4 in a row   2                  another number: duplicates are not counted
#   topk 1 of equal numbers                     another index      the lowest index
#   attention, mask of False (no key)           0                  the mean of the values
#   attention, mask of -inf (no key)            0                  NaN
#   sum over the axis -2, of length 0           [2, 3]             [2, 0, 3]: the axis stays
#   mean over an axis of length 0               NaN                0
#   any over an axis of length 0                False              True
#
# Each comes with a spelling that gives the same on both sides; the script fails if either changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.22.0 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==1.26.4
cat > "$folder/compare.py" <<'PYTHON'
import contextlib
import io
import logging
import warnings

import numpy as np
import onnxruntime as ort
import torch
from torch import nn
from torch.nn import functional as F


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def run_both(function, x):
    """Return what torch gives for x, and what the exported graph gives; the graph is traced on another length."""
    sample = torch.ones(2, 5, 3)
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(
            Module(function), (sample,), dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False
        )
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return function(x).numpy(), got


def attend(x, mask):
    """Return attention to the keys that mask lets through; the values are not 0 anywhere."""
    values = x + 1 + torch.arange(x.shape[1])[:, None]
    attended = F.scaled_dot_product_attention(x[:, None], x[:, None], values[:, None], attn_mask=mask[:, None, None])
    return attended[:, 0]


def find_keys(x):
    return (x != 0).any(dim=2)


def attend_finite(x):
    """Return the same without a mask that leaves nothing: a large finite number, and zeros where there is no key."""
    has_key = find_keys(x).sum(dim=1) > 0
    return torch.where(has_key[:, None, None], attend(x, torch.where(find_keys(x), 0.0, -1e9)), 0.0)


def mean_by_group(x):
    group = torch.zeros_like(x[..., :1], dtype=torch.int64).expand(-1, -1, 3)
    sums = x.new_zeros(x.shape[0], 1, 3).scatter_add(1, group, x)
    return sums / x.new_zeros(x.shape[0], 1, 3).scatter_add(1, group, torch.ones_like(x)).clamp(min=1)


def reduce_mean(x):
    group = torch.zeros_like(x[..., :1], dtype=torch.int64).expand(-1, -1, 3)
    return x.new_zeros(x.shape[0], 1, 3).scatter_reduce(1, group, x, "mean", include_self=False)


def mean_of_any(x):
    return x.sum(dim=1) / torch.ones_like(x).sum(dim=1).clamp(min=1)


def add_exponentials(x):
    other = x.flip(2)
    return torch.maximum(x, other) + torch.log1p(torch.exp(-(x - other).abs()))


def take_first_of_largest(x):
    is_largest = x[..., 0] == x[..., 0].amax(dim=1, keepdim=True)
    position = torch.arange(x.shape[1])
    return torch.where(is_largest, position, x.shape[1]).amin(dim=1)


some = torch.tensor([[1.0, 1.0, 4.0]]).T[None].expand(2, 3, 3).contiguous()
ties = torch.zeros(2, 40, 3)
nothing, none = torch.zeros(2, 3, 3), torch.zeros(2, 0, 3)
CASES = {
    "logaddexp": (lambda x: torch.logaddexp(x, x.flip(2)), add_exponentials, torch.full((2, 1, 3), 100.0)),
    "logsigmoid": (
        F.logsigmoid,
        lambda x: x.clamp(max=0) - torch.log1p(torch.exp(-x.abs())),
        torch.full((2, 1, 3), -200.0),
    ),
    "scatter_reduce mean": (reduce_mean, mean_by_group, some),
    "topk among ties": (lambda x: x[..., 0].topk(1, dim=1).indices[:, 0], take_first_of_largest, ties),
    "attention, mask of False": (lambda x: attend(x, find_keys(x)), attend_finite, nothing),
    "attention, mask of -inf": (
        lambda x: attend(x, torch.where(find_keys(x), 0.0, -torch.inf)),
        attend_finite,
        nothing,
    ),
    "sum over an empty axis -2": (lambda x: x.sum(dim=-2), lambda x: x.sum(dim=1), none),
    "mean over an empty axis": (lambda x: x.mean(dim=1), mean_of_any, none),
    "any over an empty axis": (lambda x: (x > 0).any(dim=1), lambda x: (x > 0).sum(dim=1) > 0, none),
}
logging.disable(logging.CRITICAL)
failed = False
for name, (function, instead, x) in CASES.items():
    expected, got = run_both(function, x)
    differs = expected.shape != got.shape or not np.array_equal(expected, got, equal_nan=True)
    try:
        expected_instead, got_instead = run_both(instead, x)
        agrees = expected_instead.shape == got_instead.shape and np.allclose(expected_instead, got_instead)
    except Exception as error:  # a spelling that cannot be exported
        agrees, got_instead = False, error
    print(f"{name:28} torch {expected.ravel()[:1]} {expected.shape}, ONNX Runtime {got.ravel()[:1]} {got.shape}")
    if not differs:
        print("    no longer differs")
    if not agrees:
        print("    the other spelling differs:", expected_instead.ravel()[:3], got_instead)
    failed |= not (differs and agrees)
raise SystemExit(failed)
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"

#!/usr/bin/env bash
# torch.export refuses a parameter that is read as `.T` inside a branch of torch.cond, and takes `.transpose(0, 1)`.
#
# Both are the same view in eager PyTorch. In a branch, `.T` ends in "cond_true might be aliasing the input or the
# output!", although what the branch returns is a product and a view of nothing; a clone of the product changes nothing.
# Who brings a low-rank layer (x @ A @ B.T) meets this as soon as it is run under a condition, and finds no view to
# remove. Outside torch.cond `.T` exports.
#
# Seen with torch 2.13.0, CPU, Python 3.11 (torch.export.export, strict=False, then run_decompositions):
#
#   how the weight is read     no condition    in a branch
#   B.T                        ok              RuntimeError
#   (B.T).clone()              ok              RuntimeError
#   B.transpose(0, 1)          ok              ok
#
# Remedy: `.transpose(0, 1)`. The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
cat > "$folder/export.py" <<'PYTHON'
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
WAYS = {
    "B.T": lambda weight: weight.T,
    "(B.T).clone()": lambda weight: weight.T.clone(),
    "B.transpose(0, 1)": lambda weight: weight.transpose(0, 1),
}


class LowRank(nn.Module):
    def __init__(self, read, has_condition):
        super().__init__()
        self.read, self.has_condition = read, has_condition
        self.first, self.second = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))

    def project(self, rows):
        return torch.tanh(rows @ (self.first @ self.read(self.second)))

    def forward(self, rows, flag):
        if not self.has_condition:
            return self.project(rows)
        return torch.cond(flag, lambda rows: self.project(rows), lambda rows: self.project(rows) * 2, (rows,))


def attempt(network):
    inputs = torch.ones(3, 4), torch.tensor(True)
    assert network(*inputs).shape == (3, 4)
    try:
        torch.export.export(network, inputs, strict=False).run_decompositions()
    except Exception as error:
        return f"{type(error).__name__}{' aliasing' * ('might be aliasing' in str(error))}"
    return "ok"


for name, read in WAYS.items():
    got = [attempt(LowRank(read, has).eval().requires_grad_(False)) for has in (False, True)]
    print(f"{name:18} no condition: {got[0]:3} in a branch: {got[1]}")
    assert got == ["ok", "ok" if "transpose" in name else "RuntimeError aliasing"]
PYTHON
"$folder/venv/bin/python" "$folder/export.py"

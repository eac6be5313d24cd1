#!/usr/bin/env bash
# PyTorch's ONNX exporter fails with a SyntaxError where a submodule is called as a keyword of Python.
#
# nn.ModuleDict takes any key, and tables of embeddings are often kept by the names of columns: the item file of
# RecBole's MovieLens-100k has one called `class`. The network runs, trains and passes torch.export; the code that
# torch.fx writes for its graph says `self.tables.class.weight`, as str.isidentifier() does not know of keywords.
#
# Seen with torch 2.13.0 (dynamo exporter), onnxscript 0.7.2, CPU, Python 3.11:
#
#   key of the table    run    torch.export    torch.onnx.export
#   genre               ok     ok              ok
#   class               ok     ok              SyntaxError
#   class_              ok     ok              ok
#
# Remedy: other names. The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.22.0 onnxscript==0.7.2 numpy==1.26.4
cat > "$folder/export.py" <<'PYTHON'
import contextlib
import io
import logging
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable()


class Tables(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key, self.tables = key, nn.ModuleDict({key: nn.Embedding(4, 3)})

    def forward(self, ids):
        return self.tables[self.key](ids)


def find_first_cause(error):
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return type(error).__name__


def attempt(call):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    except Exception as error:
        return find_first_cause(error)
    return "ok"


ids = torch.tensor([1, 2])
expected = {"genre": ["ok", "ok", "ok"], "class": ["ok", "ok", "SyntaxError"], "class_": ["ok", "ok", "ok"]}
for key, wanted in expected.items():
    network = Tables(key)
    got = [
        attempt(lambda: network(ids)),
        attempt(lambda: torch.export.export(network, (ids,))),
        attempt(lambda: torch.onnx.export(network, (ids,), dynamo=True)),
    ]
    print(f"{key:8} run: {got[0]:4} torch.export: {got[1]:4} torch.onnx.export: {got[2]}")
    assert got == wanted, f"expected {wanted}"
PYTHON
"$folder/venv/bin/python" "$folder/export.py"

#!/usr/bin/env bash
# tritonserver 2.51.0 (in the wheel nvidia-pytriton 0.7.0) ignores the request parameter `binary_data_output` of its HTTP
# endpoint as soon as a request names its outputs.
#
# KServe's binary tensor data extension has that parameter for all outputs of a request that do not say otherwise with a
# `binary_data` of their own. Guess before looking: an output that is named and says nothing comes as binary data. Seen:
# it comes as JSON, without a warning; with no `outputs` in the request the same parameter works.
#
#   binary_data_output true, no outputs named: binary data
#   binary_data_output true, output named: JSON
#   binary_data_output true, output named with binary_data true: binary data
#   binary_data_output true, output named with binary_data false: JSON
#
# Exit status 0: as described. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'nvidia-pytriton==0.7.0' 'numpy==1.26.4'
cd "$folder"
mkdir -p models/double/1 backends/python
cat > models/double/config.pbtxt <<'CONFIG'
name: "double"
backend: "python"
max_batch_size: 4
input [ { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU } ]
CONFIG
cat > models/double/1/model.py <<'PYTHON'
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb.InferenceResponse([pb.Tensor("y", 2 * each)]) for each in inputs]
PYTHON
cat > observe.py <<'PYTHON'
import json
import os
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytriton

ADDRESS = "127.0.0.1:18700"
TRITON = Path(pytriton.__file__).parent / "tritonserver"
STUB = TRITON / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
for source in [*(TRITON / "backends" / "python").iterdir(), STUB]:
    Path("backends/python", source.name).symlink_to(source)


def ask(**changes):
    """Return whether the output came as binary data."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
    body = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}, **changes}).encode()
    with urllib.request.urlopen(f"http://{ADDRESS}/v2/models/double/infer", body) as reply:
        content, length = reply.read(), reply.headers["Inference-Header-Content-Length"]
    (output,) = json.loads(content if length is None else content[: int(length)])["outputs"]
    assert ("data" in output) == (length is None)
    return length is not None


def is_ready():
    try:
        return urllib.request.urlopen(f"http://{ADDRESS}/v2/health/ready").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


libraries = os.pathsep.join(filter(None, [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]))
path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
command = [TRITON / "bin" / "tritonserver", "--model-repository=models", "--backend-directory=backends"]
command += ["--http-address=127.0.0.1", "--http-port=18700", "--allow-grpc=false", "--allow-metrics=false"]
with open("log", "w") as log:
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "PATH": path}
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
try:
    until = time.monotonic() + 60
    while not is_ready():
        assert server.poll() is None and time.monotonic() < until, Path("log").read_text()[-2000:]
        time.sleep(0.2)
    seen = {
        "no outputs named": ask(),
        "output named": ask(outputs=[{"name": "y"}]),
        "output named with binary_data true": ask(outputs=[{"name": "y", "parameters": {"binary_data": True}}]),
        "output named with binary_data false": ask(outputs=[{"name": "y", "parameters": {"binary_data": False}}]),
    }
finally:
    server.terminate()
    server.wait()
for name, is_binary in seen.items():
    print(f"binary_data_output true, {name}: {'binary data' if is_binary else 'JSON'}")
sys.exit(list(seen.values()) != [True, False, True, False])
PYTHON
"$folder/venv/bin/python" observe.py

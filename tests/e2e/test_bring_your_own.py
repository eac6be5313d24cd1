"""docs/bring-your-own.md as written: the examples, its commands in an empty folder; scores are the module's own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from kvcast.protocol.manifest import read_manifest
from tests.processes import read_until
from tests.support import TOLERANCE, find_free_ports

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "bring-your-own.md"
EXAMPLES = ROOT / "export" / "examples"
SCORE_WITH_THE_MODULE = """
import json, torch
from my_network import Taste

request = json.load(open("request.json"))
history = torch.tensor([[event["item"], event["action"]] for event in request["history"]])
candidates = torch.tensor([[each["item"], each["category"]] for each in request["candidates"]])
taste = Taste(500, 80, 64, 16, 50)
taste.load_state_dict(torch.load("checkpoint.pt", weights_only=True))
print(json.dumps(taste(history.expand(len(candidates), -1, -1), candidates).tolist()))
"""


class Reader:
    """Runs the steps of the guide in an empty folder, on free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [str(port) for port in find_free_ports(3)]
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment.pop("PYTHONPATH", None)

    def run(self, block: str) -> str:
        """Run a block of commands; return what it printed."""
        block = block.replace("kvcast rank ", f"kvcast rank --address 127.0.0.1:{self.ports[1]} ")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, block: str) -> subprocess.Popen[str]:
        """Start the command that goes on until it is ended."""
        ports = zip(("--http-port", "--grpc-port", "--metrics-port"), self.ports, strict=True)
        options = " ".join(f"{name} {port}" for name, port in ports)
        return subprocess.Popen(
            ["bash", "-c", f"exec {block.strip()} {options}"],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def copy_files(folder: Path) -> list[str]:
    """Copy the examples; return the guide's blocks of commands. What the guide quotes of a file is in it, in order."""
    shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"^```(\w+) ?([\w.]*)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    rest = {path.name: path.read_text() for path in folder.iterdir()}
    for _, name, text in blocks:
        if name:
            omitted, found, rest[name] = rest[name].partition(text)
            assert found, f"the guide quotes of {name} what is not there:\n{text}"
            assert name != "my_network.py" or not omitted.strip(), "the network is quoted in full"
    assert not rest["my_network.py"].strip(), "the network is quoted in full"
    return [text for language, name, text in blocks if language == "sh" and not name]


def test_the_guide_leads_to_a_served_and_proved_model(tmp_path):
    commands = copy_files(tmp_path)
    prepare, serve, rank = commands
    reader = Reader(tmp_path)
    exported = reader.run(prepare)
    assert "graphs = network to" in exported
    assert "cached = monolith to" in exported
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left behind"
    manifest = read_manifest(tmp_path / "repository" / "doc_fusion" / "1")
    assert (manifest.network, manifest.network_options) == ("my_network.py:ServedTaste", {"divisor": 50})
    serving = reader.start(serve)
    try:
        assert "Ctrl-C stops it" in read_until(serving, "Ctrl-C stops it")
        assert reader.run(rank).count("rank") >= 2
        expected = np.array(json.loads(reader.run(f"python - <<'END'\n{SCORE_WITH_THE_MODULE}\nEND")))
        for model in ("ranker", "ranker_resident", "ranker_resident", "ranker_full"):  # the second time with kept KV
            printed = json.loads(reader.run(f"kvcast rank request.json --json --model {model}"))
            np.testing.assert_allclose(printed["scores"], expected, rtol=0, atol=TOLERANCE)
        asked = (tmp_path / "ask.py").read_text().replace("127.0.0.1:8001", f"127.0.0.1:{reader.ports[1]}")
        assert float(reader.run(f"python - <<'END'\n{asked}\nEND")) <= TOLERANCE
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=30)

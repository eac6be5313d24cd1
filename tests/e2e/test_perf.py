"""`kvcast perf run` on a real server with the real perf_analyzer, as small as it gets."""

import json
import subprocess
import sys

import pytest

from kvcast.perf.analyzer import find_analyzer, make_environment
from tests.support import find_free_ports


def can_run_analyzer() -> bool:
    """Whether perf_analyzer finds its libraries (`make setup-perf` brings them)."""
    done = subprocess.run([find_analyzer(), "--help"], env=make_environment(), capture_output=True, check=False)
    return b"shared libraries" not in done.stderr


@pytest.mark.skipif(not can_run_analyzer(), reason="perf_analyzer lacks libb64: run `make setup-perf`")
def test_a_small_run_measures_reports_and_draws(tiny_repository, tmp_path):
    http, grpc, metrics = (str(port) for port in find_free_ports(3))
    command = [sys.executable, "-m", "kvcast.perf", "run", "--config", "tiny", "--repository", str(tiny_repository)]
    command += ["--quick", "--results", str(tmp_path), "--name", "small", "--counts", "1,10", "--requests", "4"]
    command += ["--experiments", "table,stages,load,packing"]
    command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "regime:" in done.stdout
    assert "[4/4] packing" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["candidates"] == 10
    result = json.loads((tmp_path / "small.json").read_text())
    assert [row["candidates"] for row in result["table"]] == [1, 10]
    for row in result["table"]:
        assert row["shared_seconds"] > 0
        assert row["traditional_rounds"]
        assert not row["traditional_is_extrapolated"]
    assert result["stages"]["total_seconds"] > 0
    assert len(result["load"]["open_loop"]) == 2
    report = (tmp_path / "small.md").read_text()
    for words in ("claimed", "Under load", "C_fusion", "2 threads a session" if "2 cores" in report else "threads"):
        assert words in report
    assert {path.name for path in tmp_path.glob("*.png")} == {"small-table.png", "small-stages.png", "small-load.png"}

"""The real perf_analyzer on a real server: by docs/clients.md and by `python -m perf run`, as small as it gets."""

import json
import subprocess
import sys

import pytest

from kvcast.protocol.manifest import MANIFEST_FILE
from kvcast.protocol.tensors import RANKER_RESIDENT
from kvcast.synthetic.__main__ import main as clicklog
from perf.analyzer import find_analyzer, make_environment, read_report
from tests.support import find_free_ports


def can_run_analyzer() -> bool:
    """Whether perf_analyzer finds its libraries (`make setup-perf` brings them)."""
    done = subprocess.run([find_analyzer(), "--help"], env=make_environment(), capture_output=True, check=False)
    return b"shared libraries" not in done.stderr


needs_analyzer = pytest.mark.skipif(not can_run_analyzer(), reason="perf_analyzer lacks libb64: run `make setup-perf`")


@needs_analyzer
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_runs_with_the_requests_of_kvcast_clicklog(server, tiny_repository, tmp_path, protocol):
    data, report = tmp_path / "requests.json", tmp_path / "report.csv"
    manifest = tiny_repository / RANKER_RESIDENT.name / "1" / MANIFEST_FILE
    assert clicklog(["--manifest", str(manifest), "--perf-input", str(data), "--requests", "20"]) == 0
    address = server.http_address if protocol == "http" else server.grpc_address
    command = [str(find_analyzer()), "-m", RANKER_RESIDENT.name, "-i", protocol, "-u", address]
    command += ["--input-data", str(data), "--request-count", "40", "-f", str(report)]
    done = subprocess.run(command, env=make_environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_report(report.read_text()).throughput > 0


@needs_analyzer
def test_a_small_run_measures_reports_and_draws(tiny_repository, tmp_path):
    http, grpc, metrics = (str(port) for port in find_free_ports(3))
    command = [sys.executable, "-m", "perf", "run", "--config", "tiny", "--repository", str(tiny_repository)]
    command += ["--quick", "--results", str(tmp_path), "--name", "small", "--counts", "1,10", "--requests", "4"]
    command += ["--experiments", "table,stages,load,packing,reuse,trace,endurance,guard"]
    command += ["--endurance", "3", "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "regime:" in done.stdout
    assert "[8/8] guard" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["candidates"] == 10
    result = json.loads((tmp_path / "small.json").read_text())
    assert [row["candidates"] for row in result["table"]] == [1, 10]
    for row in result["table"]:
        assert row["shared_seconds"] > 0
        assert row["traditional_rounds"]
        assert not row["traditional_is_extrapolated"]
    assert result["stages"]["total_seconds"] > 0
    assert len(result["load"]["open_loop"]) == 2
    (row,) = (row for row in result["reuse"]["rows"] if row["candidates"] == 10)
    assert row["warm_ranker_resident"] > 0
    assert set(result["reuse"]["process_bytes"]) == {"user_encoder", "doc_fusion", "ranker_resident"}
    assert all(size > 1e6 for size in result["reuse"]["process_bytes"].values())
    assert [row["way"] for row in result["trace"]["rows"]] == ["no cache", "ensemble", "resident"]
    assert result["trace"]["rows"][0]["hit_rate"] == 0
    for row in result["trace"]["rows"][1:]:
        assert row["hit_rate"] == pytest.approx(row["expected_hit_rate"], abs=0.1)
    for sample in result["endurance"]["samples"]:
        assert all(held <= result["endurance"]["budget_bytes"] for held in sample["cache_bytes"].values())
    for row in result["guard"]["rows"]:
        assert set(row["cpu"]) == {"guard", "tritonserver", "ranker_resident"}
        assert all(0 < seconds < 1 for seconds in row["cpu"].values())
    report = (tmp_path / "small.md").read_text()
    for words in (
        "claimed",
        "Under load",
        "A returning user",
        "Returning users",
        "Memory through",
        "C_fusion",
        "1 threads a session",  # more would not pay for so small a network
        "CPU time of each process",
    ):
        assert words in report
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"small-{name}.png" for name in ("table", "stages", "load", "reuse", "trace", "endurance")}

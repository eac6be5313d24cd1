"""The load tests' own parts: arithmetic, reading perf_analyzer, the peers' scores, reports and plots."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcast.protocol.config import load_config
from kvcast.protocol.request import RankRequest
from kvcast.synthetic import ClickLog, Visit, write_perf_input
from perf.__main__ import main, write_files
from perf.affinity import read_trace
from perf.analyzer import PerfError, read_report
from perf.baselines.race import WARM_UPS, Field, RaceError, Worker, race, start_workers
from perf.baselines.worker import make_peer
from perf.cost_model import CostModel, claimed_gain, claimed_speedup, throughput_drop
from perf.reuse import simulate_lru
from tests.support import EXPORTED_TOML, TOLERANCE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("config", "user", "trimmed", "fusion", "full", "kv", "ideal"),
    [
        ("bench", 10.4, 8.05, 0.0416, 10.4, 8.192, {1: 1.3, 5: 6.3, 10: 12.3, 50: 51.5, 100: 85.5, 1000: 210}),
        ("seed", 861, 847, 3.45, 865, 307.2, {1: 1.02, 5: 5.0, 10: 9.8, 50: 42.5, 100: 72.6, 1000: 201}),
    ],
)
def test_the_cost_model_agrees_with_manual_arithmetic(config, user, trimmed, fusion, full, kv, ideal):
    model = CostModel.of(load_config(config))
    assert model.user_flops(trimmed=False) / 1e9 == pytest.approx(user, rel=0.01)
    assert model.user_flops() / 1e9 == pytest.approx(trimmed, rel=0.01)
    assert model.fusion_flops() / 1e9 == pytest.approx(fusion, rel=0.01)
    assert model.full_flops(1) / 1e9 == pytest.approx(full, rel=0.01)
    assert model.user_kv_bytes() / 1e6 == pytest.approx(kv)
    for count, speedup in ideal.items():
        assert model.ideal_speedup(count) == pytest.approx(speedup, rel=0.02)


def test_the_documents_own_numbers():
    """Speedup(N), gain and throughput drop as their table has them (it rounds the gain before the drop)."""
    assert [round(claimed_speedup(count), 2) for count in (1, 5, 10, 50, 100)] == [1.0, 3.12, 4.26, 5.99, 6.31]
    assert [100 * claimed_gain(count) // 1 for count in (1, 5, 10, 50, 100)] == [0, 68, 76, 83, 84]
    assert throughput_drop(1 - 0.83) == pytest.approx(0.068)
    # 1000 tokens x 768 dims x 8 bytes, 50 layers, 49 copies not made: 14.7 GB where they count 6 MB a layer.
    assert CostModel.of(load_config("seed")).user_kv_bytes() * 49 / 1e9 == pytest.approx(15.05, abs=0.01)


def test_the_model_command_runs_nothing_and_shows_both(capsys):
    assert main(["model", "--config", "bench"]) == 0
    printed = capsys.readouterr().out
    assert "51.5" in printed
    assert "5.99" in printed
    assert "8.2 MB" in printed
    assert main(["model", "--config", "nonsense"]) == 1
    assert "expected one of" in capsys.readouterr().err


def test_perf_analyzers_report_is_read():
    text = (
        "Concurrency,Inferences/Second,Client Send,Server Queue,Client Recv,"
        "p50 latency,p90 latency,p99 latency,Avg latency\n"
        "1,20.5,11,3,4,48000,60000,70000,49000\n"
    )
    measurement = read_report(text)
    assert measurement.throughput == 20.5
    assert measurement.p50 == 0.048
    assert measurement.mean == 0.049
    assert measurement.p99 == 0.07
    with pytest.raises(PerfError, match="expected one row"):
        read_report(text.splitlines()[0])


def test_input_data_has_shapes_without_the_batch_axis(tmp_path):
    log = ClickLog(load_config("tiny").schema, seed=1)
    write_perf_input([log.draw_request(3, 2)], tmp_path / "data.json")
    (entry,) = json.loads((tmp_path / "data.json").read_text())["data"]
    assert entry["history"]["shape"] == [3, 2]
    assert len(entry["candidates"]["content"]) == 8


@pytest.mark.parametrize("name", ["traditional", "ort_expanded", "torch_expanded", "torch_flash"])
def test_baselines_give_the_same_scores(tiny_repository, name):
    """The compiled one is left out: it takes a minute to make."""
    field = Field(str(EXPORTED_TOML), tiny_repository, threads=1, seed=0)
    ours, peer = (make_peer(each, field) for each in ("shared", name))
    request = ClickLog(load_config(field.config).schema, seed=1).draw_request(30, 7)
    expected, got = (each.fuse(each.encode(request.history), request.candidates) for each in (ours, peer))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_peers_race_in_processes_of_their_own(tiny_repository):
    field = Field(str(EXPORTED_TOML), tiny_repository, threads=1, seed=0)
    with start_workers(["shared", "torch_flash"], field) as workers:
        results = race(workers, history=30, candidates=7, rounds=1)
    assert set(results) == {"shared", "torch_flash"}
    for result in results.values():
        assert result["score_difference"] <= TOLERANCE
        assert result["total"] > 0


class FakeWorker(Worker):
    """A peer that answers the same each time; no process."""

    def __init__(self, name: str, **answer: Any) -> None:
        self.name, self.answer, self.asked = name, {"encode": 1.0, "fuse": 2.0, "added_bytes": 3} | answer, 0

    def ask(self, history: int, candidates: int, seed: int) -> dict[str, Any]:
        self.asked += 1
        return self.answer


def test_a_peer_with_other_scores_ends_the_race():
    peers = [FakeWorker("shared", scores=[0.5, 1.0]), FakeWorker("torch_flash", scores=[0.5, 1.00002])]
    with pytest.raises(RaceError, match="torch_flash"):
        race(peers, history=10, candidates=2, rounds=1)


def test_a_peer_that_fails_is_reported_as_failed_and_not_asked_again():
    peers = [FakeWorker("shared", scores=[0.5]), FakeWorker("peer", error="MemoryError: too much")]
    results = race(peers, history=10, candidates=1, rounds=3)
    assert results["peer"] == {"error": "MemoryError: too much"}
    assert results["shared"]["total"] == 3.0
    assert (results["shared"]["rounds"], peers[0].asked, peers[1].asked) == (3, WARM_UPS + 3, 1)


def test_a_worker_that_dies_is_an_error(tmp_path):
    with pytest.raises(RaceError, match="its process ended"), start_workers(["shared"], Field("tiny", tmp_path, 1, 0)):
        pytest.fail("it started without an export")


RESULTS = sorted((ROOT / "perf" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_reports_are_those_of_their_results(path, tmp_path):
    result = json.loads(path.read_text())
    write_files(result, tmp_path)
    assert (tmp_path / f"{path.stem}.md").read_text() == path.with_suffix(".md").read_text()
    for plot in tmp_path.glob("*.png"):
        assert (path.parent / plot.name).exists()


def test_the_perf_command_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    assert "--full-limit" in capsys.readouterr().out


def test_a_plain_lru_counts_the_hits_that_its_budget_allows():
    histories = [np.full((length, 2), number) for number, length in ((1, 4), (2, 4), (1, 4), (3, 4), (2, 4), (9, 99))]
    trace = [Visit(0, RankRequest(history, np.ones((1, 4), np.int64))) for history in histories]
    assert simulate_lru(trace, lambda length: length, budget=100) == 2
    assert simulate_lru(trace, lambda length: length, budget=8) == 1  # 3 drives 2 out
    assert simulate_lru(trace, lambda length: length, budget=3) == 0


def test_a_trace_is_read_in_order_of_time(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("user,seconds\nanna,2\nbert,0.5\nanna,10\n")
    first, *others = read_trace(path)
    assert others == [others[0]] * 2
    assert first != others[0]


@pytest.mark.parametrize("text", ["", "user,seconds\n", "who,when\n1,2\n", "user,seconds\n1,noon\n"])
def test_a_file_that_is_not_a_trace_is_rejected(text, tmp_path):
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(PerfError, match="expected CSV with the columns"):
        read_trace(tmp_path / "trace.csv")

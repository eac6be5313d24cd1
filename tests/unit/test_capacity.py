"""The arithmetic of capacity, against sums done in full, against the simulator, and as the command that people use."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from kvcast.perf.__main__ import main, make_parser
from kvcast.perf.analyzer import PerfError
from kvcast.perf.cost_model import CostModel
from kvcast.perf.fleet.capacity import (
    LONGEST_SECONDS,
    Reuse,
    Service,
    Visitors,
    bin_popularity,
    count_servers,
    find_servers,
)
from kvcast.perf.fleet.measured import read_measurements
from kvcast.perf.fleet.plan import make_plan
from kvcast.perf.fleet.simulator import Fleet, simulate, summarise
from kvcast.perf.fleet.visits import draw_visits

RESULTS = Path(__file__).parents[2] / "perf" / "results"
KEPT, BENCH = RESULTS / "bench-kept.json", RESULTS / "bench.json"
SEED_KEPT, SEED = RESULTS / "seed-kept.json", RESULTS / "seed.json"


def plan(*options: str, files: tuple[Path, ...] = (KEPT, BENCH)) -> dict:
    arguments = ["plan", "--users", "100000", "--qps", "400", "--from", *map(str, files), *options]
    parsed: argparse.Namespace = make_parser().parse_args(arguments)
    return make_plan(parsed, read_measurements(parsed.results))


# ---- who is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.6, 0.8, 1.1])
def test_bins_of_popularity_sum_as_all_users_do(exponent):
    users = 300_000
    weights = np.arange(1, users + 1, dtype=np.float64) ** -exponent
    shares = weights / weights.sum()
    binned, counts = bin_popularity(users, exponent)
    assert counts.sum() == users
    assert (binned * counts).sum() == pytest.approx(1)
    for time in (1e1, 1e3, 1e5, 1e7):  # what the formulas sum: users seen, weighted and not
        assert (counts * -np.expm1(-time * binned)).sum() == pytest.approx(-np.expm1(-time * shares).sum(), rel=1e-4)
        weighted = (counts * binned * -np.expm1(-time * binned)).sum()
        assert weighted == pytest.approx((shares * -np.expm1(-time * shares)).sum(), rel=1e-4)


def test_without_pages_and_changes_it_is_ches_approximation_of_an_lru():
    """Each request by itself, users by Zipf's law: Σ pᵢ(1 - exp(-qpᵢT)) with Σ(1 - exp(-qpᵢT)) = room."""
    reuse = Reuse(Visitors(5000, 0.9, returns=0, unchanged=1), rate=100)
    shares = np.arange(1, 5001, dtype=np.float64) ** -0.9
    shares /= shares.sum()
    for room in (10, 300, 4000):
        seconds = reuse.time_kept(room)
        assert -np.expm1(-100 * shares * seconds).sum() == pytest.approx(room, rel=1e-4)
        expected = -(shares * np.expm1(-100 * shares * seconds)).sum()
        assert reuse.hit_rate_of(room) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("visitors", "room"),
    [
        (Visitors(20_000, 0.8, returns=0, unchanged=1), 1000),
        (Visitors(20_000, 1.1, returns=0, unchanged=1), 300),
        (Visitors(20_000, 0.8, returns=0.5, page_seconds=30, unchanged=0.5), 1000),
        (Visitors(20_000, 0.6, returns=0.7, page_seconds=5, unchanged=0), 300),
        (Visitors(20_000, 0.8, returns=0.3, page_seconds=20, unchanged=1), 3000),
    ],
)
def test_the_formula_says_what_an_exact_lru_does(visitors, room):
    """Within one point, for one cache of everybody."""
    visits = draw_visits(visitors, rate=40, seconds=2500, seed=3)
    exact = summarise(simulate(Fleet(1, room), visits), settled_after=1000)
    assert Reuse(visitors, 40).hit_rate_of(room) == pytest.approx(exact["hit_rate"], abs=0.01)


def test_a_budget_gives_a_hit_rate_and_a_hit_rate_a_budget():
    reuse = Reuse(Visitors(1_000_000), rate=500)
    rates = [reuse.hit_rate_of(entries) for entries in (0, 100, 10_000, 1_000_000)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0, abs=1e-3)
    for hit_rate in (0.05, 0.4, 0.55, 0.7):
        assert reuse.hit_rate_of(reuse.entries_for(hit_rate)) == pytest.approx(hit_rate, abs=1e-4)
    assert reuse.entries_for(0) == 0
    assert Reuse(Visitors(10, unchanged=1), 1).hit_rate_of(1e6) == pytest.approx(1, abs=1e-3)  # everybody is kept
    assert Reuse(Visitors(10, unchanged=1), 1).time_kept(1e6) == LONGEST_SECONDS


def test_a_hit_rate_that_nothing_reaches_is_refused():
    visitors = Visitors(1000, returns=0.4, unchanged=0.5)
    assert visitors.highest_hit_rate == pytest.approx(0.7)
    with pytest.raises(PerfError, match=r"hit rate: expected at most 0\.700.*got 0\.8"):
        Reuse(visitors, 10).entries_for(0.8)


# ---- how long, how many ---------------------------------------------------------------------------------------------


def test_the_wait_is_that_of_a_queue():
    """Pollaczek and Khinchine, against a simulated server with Poisson arrivals of users kept and not."""
    visitors = Visitors(50_000, 0.5, returns=0, unchanged=1)
    visits = draw_visits(visitors, rate=20, seconds=10_000, seed=1)
    fleet = Fleet(1, 20_000, warm_seconds=0.01, cold_seconds=0.05)
    got = summarise(simulate(fleet, visits), settled_after=4000)
    service = Service(0.01, 0.05, got["hit_rate"])
    assert got["utilisation"] == pytest.approx(20 * service.mean, rel=0.03)
    expected = service.mean + service.mean_wait(20 * service.mean)
    assert got["mean_seconds"] == pytest.approx(expected, rel=0.05)
    assert got["p99_seconds"] < service.cold + service.long_wait(20 * service.mean) < 1.5 * got["p99_seconds"]


def test_servers_are_counted_by_the_formula():
    assert count_servers(400, 0.03, 1, 0.6) == 20
    assert count_servers(401, 0.03, 1, 0.6) == 21
    assert count_servers(400, 0.03, 2, 0.6) == 10
    assert count_servers(0.001, 0.03, 1, 0.6) == 1


def test_a_budget_finds_the_fewest_servers_that_do():
    reuse, service = Reuse(Visitors(1_000_000), 400), (0.0142, 0.0475)

    def enough(hit_rate: float) -> int:
        return count_servers(400, Service(*service, hit_rate).mean, 1, 0.6)

    for room in (0, 50, 800, 1e5):
        servers, hit_rate = find_servers(reuse, room, enough)
        assert enough(hit_rate) <= servers
        assert hit_rate == reuse.hit_rate_of(servers * room)
        assert enough(reuse.hit_rate_of((servers - 1) * room)) > servers - 1


# ---- what was measured ----------------------------------------------------------------------------------------------


def test_sizes_that_were_measured_are_taken_as_they_are():
    rows = {row["candidates"]: row for row in json.loads(KEPT.read_text())["reuse"]["rows"]}
    measured = read_measurements([KEPT, BENCH])
    assert measured.model == "ranker_resident"
    for count, row in rows.items():
        assert measured.estimate_warm(1000, count) == (row["warm_ranker_resident"], "measured")
        assert measured.estimate_cold(1000, count) == (row["cold_ranker_resident"], "measured")
    table = {row["candidates"]: row for row in json.loads(BENCH.read_text())["table"]}
    assert measured.estimate_traditional(1000, 50) == (table[50]["traditional_seconds"], "measured")


def test_other_sizes_say_how_they_are_known():
    measured = read_measurements([KEPT])
    fast, slow = measured.estimate_warm(1000, 50).seconds, measured.estimate_warm(1000, 100).seconds
    between = measured.estimate_warm(1000, 75)
    assert between.seconds == pytest.approx((fast + slow) / 2)
    assert between.source.endswith("between N=50 and N=100, measured")
    longer = measured.estimate_cold(2000, 50)
    ratio = measured.cost(2000).shared_flops(50) / measured.cost(1000).shared_flops(50)
    assert longer.seconds == pytest.approx(ratio * measured.estimate_cold(1000, 50).seconds)
    assert longer.source == "scaled by FLOPs from N=50, L=1000"
    assert measured.estimate_warm(1000, 1000).source == "scaled by FLOPs from N=100, L=1000"
    assert "ratio of their FLOPs" in measured.estimate_traditional(1000, 50).source


def test_times_scaled_by_flops_are_near_those_measured():
    """From L=1000 to a quarter and to four times of it, as bench.json has it: within a factor of 1.6."""
    result = json.loads(BENCH.read_text())
    rows = {row["history"]: row for row in result["history_growth"]}
    config = result["config"]
    flops = {
        length: CostModel(
            length, config["width"], config["layers"], config["heads"], config["candidate_tokens"]
        ).shared_flops(50)
        for length in rows
    }
    for length, row in rows.items():
        scaled = rows[1000]["shared_seconds"] * flops[length] / flops[1000]
        assert 1 / 1.6 < scaled / row["shared_seconds"] < 1.6, length


def test_the_peak_that_was_reached_counts_where_it_was_measured():
    measured = read_measurements([BENCH])
    assert measured.model == "ranker"
    best = max(row["throughput"] for row in json.loads(BENCH.read_text())["load"]["closed_loop"])
    assert measured.estimate_cold(1000, 50).seconds == 1 / best
    assert "peak" in measured.estimate_cold(1000, 50).source
    assert measured.estimate_cold(1000, 10).source == "measured"
    assert 0 < measured.estimate_warm(1000, 50).seconds < measured.estimate_cold(1000, 50).seconds


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_adds_up():
    got = plan("--hit-rate", "0.5", "--price-per-hour", "0.36", "--spare", "2")
    mean = 0.5 * got["warm_seconds"] + 0.5 * got["cold_seconds"]
    assert got["service_seconds"] == pytest.approx(mean)
    assert got["servers_busy"] == int(np.ceil(400 * mean / 0.6))
    assert got["servers"] == got["servers_busy"] + 2
    assert got["busy"] <= 0.6
    assert got["server_seconds_a_million"] == pytest.approx(1e6 * got["servers"] / 400)
    assert got["price_a_million"] == pytest.approx(got["server_seconds_a_million"] * 0.36 / 3600)
    # 8 MB of keys and values, and little beside them
    assert 8.192e6 < got["user_bytes"] < 1.05 * 8.192e6
    assert got["budget_bytes"] == pytest.approx(got["users_kept_each"] * got["user_bytes"])
    assert got["server_bytes"] == got["start_bytes"] + got["budget_bytes"] + got["run_bytes"]
    assert got["traditional"]["servers"] > 50 * got["servers"]


def test_hit_rate_and_budget_are_two_ways_to_ask_for_the_same():
    asked = plan("--hit-rate", "0.5")
    again = plan("--budget", str(asked["budget_bytes"] / 1e6))
    assert again["hit_rate"] == pytest.approx(0.5, abs=1e-3)
    assert again["servers"] == asked["servers"]


def test_a_better_cache_needs_fewer_servers():
    assert (
        plan("--hit-rate", "0.7")["servers"] < plan("--hit-rate", "0.1")["servers"] < plan("--hit-rate", "0")["servers"]
    )


def test_the_plan_command_shows_the_formula_with_its_numbers(capsys):
    command = ["plan", "--users", "2000000", "--qps", "400", "--candidates", "50", "--history", "1000"]
    assert main([*command, "--hit-rate", "0.5", "--from", str(KEPT), str(BENCH), "--price-per-hour", "0.2"]) == 0
    printed = capsys.readouterr().out
    for expected in ("⌈400/s · 0.03086 s / (1 · 0.6)⌉ = 21, and 1", "as asked", "kvcast deploy size", "at 0.2 an hour"):
        assert expected in printed
    assert main([*command, "--budget", "8000", "--from", str(KEPT), "--json"]) == 0
    assert 0.4 < json.loads(capsys.readouterr().out)["hit_rate"] < 0.6
    assert main([*command, "--budget", "8000", "--from", str(BENCH)]) == 0
    assert "add a result of --experiments reuse" in capsys.readouterr().out


def test_the_source_documents_size_is_planned_from_its_own_results(capsys):
    command = ["plan", "--users", "1000000", "--qps", "10", "--hit-rate", "0.5"]
    assert main([*command, "--from", str(SEED_KEPT), str(SEED)]) == 0
    assert "seed, ranker_resident" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hit-rate", "1.2"], "hit rate: expected a share between 0 and 1, got 1.2"),
        (["--hit-rate", "-0.1"], "hit rate: expected a share between 0 and 1, got -0.1"),
        (["--hit-rate", "0.9"], "hit rate: expected at most 0.750"),
        (["--hit-rate", "0.5", "--candidates", "2000"], "candidates: expected 1 to 1024, the limit of bench, got 2000"),
        (["--hit-rate", "0.5", "--history", "5000"], "history: expected 1 to 4096, the limit of bench, got 5000"),
        (["--hit-rate", "0.5", "--candidates", "0"], "candidates: expected 1 to 1024"),
        (["--hit-rate", "0.5", "--qps", "0"], "requests a second: expected more than 0, got 0"),
        (["--hit-rate", "0.5", "--users", "0"], "users: expected at least 1, got 0"),
        (["--hit-rate", "0.5", "--utilisation", "1"], "utilisation: expected a share between 0 and 1"),
        (["--hit-rate", "0.5", "--workers", "0"], "workers: expected at least 1, got 0"),
        (["--hit-rate", "0.5", "--spare", "-1"], "spare: expected at least 0, got -1"),
        (["--hit-rate", "0.5", "--returns", "1"], "returns: expected a probability below 1"),
        (["--hit-rate", "0.5", "--unchanged", "2"], "unchanged: expected a probability"),
        (["--hit-rate", "0.5", "--zipf", "-1"], "exponent: expected at least 0"),
        (["--hit-rate", "0.5", "--page-seconds", "0"], "page seconds: expected more than 0"),
        (["--budget", "-1"], "budget: expected at least 0 MB"),
        (["--hit-rate", "0.5", "--from", str(RESULTS / "bench-guard.json")], "--experiments reuse"),
        (["--hit-rate", "0.5", "--from", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--hit-rate", "0.5", "--from", __file__], "not JSON"),
        (["--hit-rate", "0.5", "--from", str(KEPT), str(SEED)], "expected a result of bench, got seed"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options, message, capsys):
    assert main(["plan", "--users", "1000", "--qps", "100", "--from", str(KEPT), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_result_that_lacks_what_is_needed_says_which_command_makes_it(tmp_path, capsys):
    (tmp_path / "half.json").write_text(json.dumps({"config": json.loads(KEPT.read_text())["config"], "machine": {}}))
    assert main(["plan", "--users", "9", "--qps", "1", "--budget", "1", "--from", str(tmp_path / "half.json")]) == 1
    assert "kvcast perf run --config bench --experiments reuse" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("[]")
    assert main(["plan", "--users", "9", "--qps", "1", "--budget", "1", "--from", str(tmp_path / "none.json")]) == 1
    assert "expected a result file of `kvcast perf run`" in capsys.readouterr().err


def test_a_server_that_was_measured_reached_most_of_what_the_formula_allows():
    """In bench-trace.json: histories of 500 to 1000 events, the callers on the same two cores."""
    measured = read_measurements([KEPT])
    warm, cold = measured.estimate_warm(750, 50).seconds, measured.estimate_cold(750, 50).seconds
    rows = json.loads((RESULTS / "bench-trace.json").read_text())["trace"]["rows"]
    reached = [
        row["throughput"] * Service(warm, cold, row["hit_rate"]).mean for row in rows if row["model"] == measured.model
    ]
    assert len(reached) == 3
    assert 0.7 < min(reached) < max(reached) < 0.85

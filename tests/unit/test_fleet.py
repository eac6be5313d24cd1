"""The simulator of many servers: against a plain LRU, against a plain ring, and against what must never happen."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.perf.__main__ import main
from kvcast.perf.analyzer import PerfError
from kvcast.perf.fleet import study
from kvcast.perf.fleet.capacity import Visitors
from kvcast.perf.fleet.ring import Ring, count_slots, mix
from kvcast.perf.fleet.simulator import (
    Cache,
    Change,
    Fleet,
    Policy,
    Simulation,
    count_moved,
    follow_hits,
    simulate,
    summarise,
)
from kvcast.perf.fleet.visits import Visits, draw_visits, read_visits, space_visits

USERS = np.arange(100_000)


def make_visits(users: list[int], sizes: list[float] | None = None) -> Visits:
    """Return one visit a second."""
    visits = space_visits(users, rate=1)
    return visits if sizes is None else replace(visits, sizes=np.array(sizes))


def replay_plainly(contents: list[int], sizes: list[float], budget: float, time_to_live: float = 0) -> list[bool]:
    """Return the hits of an LRU of lists, in which nothing is clever. One visit a second."""
    kept: list[tuple[int, float, int]] = []  # content, size, made; least recently used first
    hits = []
    for now, (content, size) in enumerate(zip(contents, sizes, strict=True)):
        if time_to_live:
            kept = [entry for entry in kept if now - entry[2] < time_to_live]
        found = [entry for entry in kept if entry[0] == content]
        hits.append(bool(found))
        if found:
            kept.remove(found[0])
            kept.append(found[0])
        elif size <= budget:
            while sum(entry[1] for entry in kept) + size > budget:
                kept.pop(0)
            kept.append((content, size, now))
    return hits


# ---- one server -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    users=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    budget=st.integers(0, 15),
    time_to_live=st.sampled_from([0, 0, 3, 10]),
    policy=st.sampled_from(list(Policy)),
    data=st.data(),
)
def test_one_server_is_a_plain_lru(users, budget, time_to_live, policy, data):
    weight = data.draw(st.lists(st.integers(1, 4), min_size=13, max_size=13))
    sizes = [float(weight[user]) for user in users]
    fleet = Fleet(1, budget, policy, time_to_live=time_to_live)
    simulation = Simulation(fleet, make_visits(users, sizes=sizes))
    simulation.run()
    simulation.check()
    assert [bool(hit) for hit in simulation.is_hit] == replay_plainly(users, sizes, budget, time_to_live)


@settings(deadline=None, max_examples=50)
@given(
    users=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    servers=st.integers(1, 5),
    budget=st.integers(0, 10),
)
def test_with_affinity_every_server_is_a_plain_lru_of_its_users(users, servers, budget):
    visits = make_visits(users)
    simulation = simulate(Fleet(servers, budget, points=16), visits)
    simulation.check()
    homes = Ring(range(servers), 16).find_servers(visits.users)
    np.testing.assert_array_equal(homes, simulation.servers)
    for server in range(servers):
        own = np.flatnonzero(homes == server)
        expected = replay_plainly([users[place] for place in own], [1.0] * len(own), budget)
        assert [bool(simulation.is_hit[place]) for place in own] == expected


def test_a_server_answers_one_request_after_the_other():
    visits = Visits(np.array([0.0, 0.0, 0.5, 9.0]), np.array([1, 1, 2, 1]), np.array([1, 1, 2, 1]))
    simulation = simulate(Fleet(1, 10, warm_seconds=1, cold_seconds=3), visits)
    assert list(simulation.latencies) == [3, 4, 6.5, 1]
    assert [bool(hit) for hit in simulation.is_hit] == [False, True, False, True]


def test_a_cache_notices_that_its_count_is_wrong():
    cache = Cache(3)
    cache.ask(1, 1, 0)
    cache.check()
    cache.held = 2
    with pytest.raises(AssertionError, match="2 held"):
        cache.check()


# ---- the ring -------------------------------------------------------------------------------------------------------


def test_a_user_belongs_to_the_nearest_point_around_the_circle():
    ring = Ring(range(3), 4)
    circle = 2**64
    for user, place in zip(USERS[:300], ring.find(USERS[:300]), strict=True):
        where = int(mix(np.array([user]))[0])
        distances = [min((where - int(at)) % circle, (int(at) - where) % circle) for at in ring.places]
        assert distances[place] == min(distances)


def test_hashes_are_spread_evenly():
    counts = np.bincount((mix(USERS) >> np.uint64(60)).astype(np.int64), minlength=16)
    assert counts.max() / counts.mean() < 1.1


@pytest.mark.parametrize("servers", [3, 20])
def test_a_server_that_leaves_moves_its_own_users_and_no_others(servers):
    full = Ring(range(servers), 1024)
    rest = Ring([server for server in range(servers) if server != 1], 1024)
    before, after = full.find_servers(USERS), rest.find_servers(USERS)
    assert (before[before != after] == 1).all()
    assert 0 < count_moved(full, rest, USERS) < 1.3 / servers
    # Those who move are shared by all the others.
    assert len(np.unique(after[before == 1])) == servers - 1


def test_more_points_level_the_servers():
    uneven = [np.bincount(Ring(range(10), points).find_servers(USERS)).max() / 10_000 for points in (1, 16, 1024)]
    assert uneven[0] > uneven[1] > uneven[2]
    assert uneven[2] < 1.1


# ---- bounded load ---------------------------------------------------------------------------------------------------


def count_slots_of_haproxy(served: int, percent: int, servers: int, place: int, weight: int) -> int:
    """Return the slots as haproxy computes them, weight by weight, in whole numbers."""
    total_weight = servers * weight
    slots = ((served + 1) * percent + 99) // 100
    each, remainder = divmod(slots, total_weight)
    before = place * weight
    share = (before + weight) * remainder // total_weight - before * remainder // total_weight
    return max(1, weight * each + share)


@given(
    served=st.integers(0, 500),
    percent=st.integers(101, 500),
    servers=st.integers(1, 30),
    weight=st.sampled_from([16, 160, 1024]),
)
def test_slots_are_haproxys(served, percent, servers, weight):
    slots = [count_slots(served, percent / 100, servers, place) for place in range(servers)]
    assert slots == [count_slots_of_haproxy(served, percent, servers, place, weight) for place in range(servers)]
    assert sum(slots) > served  # somebody always has room
    assert max(slots) <= max(1, math.ceil(math.ceil(percent * (served + 1) / 100) / servers))


@pytest.mark.parametrize("factor", [1.25, 2.0, 4.0])
def test_no_server_is_given_more_than_its_share_of_what_is_in_flight(factor):
    visits = draw_visits(Visitors(500, 1.1), rate=200, seconds=20, seed=5)
    fleet = Fleet(8, 20, Policy.BOUNDED, factor, points=16, warm_seconds=0.02, cold_seconds=0.04)
    simulation = Simulation(fleet, visits)
    highest = 0
    for _ in range(len(visits)):
        server = simulation.send()
        highest = max(highest, simulation.in_flight[server])
        assert simulation.in_flight[server] <= math.ceil(factor * simulation.total / fleet.servers) + 1e-9
        if len(simulation.servers) % 100 == 0:
            simulation.check()
    simulation.check()
    assert highest > 2  # the bound was met
    assert summarise(simulation)["elsewhere"] > 0


def test_without_requests_in_flight_a_bound_changes_nothing():
    visits = draw_visits(Visitors(500), rate=50, seconds=20, seed=5)
    bounded, free = (simulate(Fleet(5, 20, policy), visits) for policy in (Policy.BOUNDED, Policy.AFFINITY))
    assert bounded.servers == free.servers


def test_a_bound_costs_hits_and_levels_load():
    visits = draw_visits(Visitors(20_000), rate=200, seconds=200, seed=2)
    fleet = Fleet(10, 500, warm_seconds=0.0142, cold_seconds=0.0475)
    rows = {}
    for policy, factor in ((Policy.BOUNDED, 1.25), (Policy.BOUNDED, 4.0), (Policy.AFFINITY, 4.0)):
        simulation = simulate(replace(fleet, policy=policy, factor=factor), visits)
        rows[policy, factor] = summarise(simulation, 100)
    tight, wide, none = rows.values()
    assert tight["hit_rate"] < wide["hit_rate"] - 0.1 < none["hit_rate"]
    assert tight["imbalance"] < none["imbalance"]


# ---- many servers ---------------------------------------------------------------------------------------------------


def test_round_robin_is_even_and_finds_few():
    visits = draw_visits(Visitors(20_000), rate=100, seconds=200, seed=2)
    even, own = (summarise(simulate(Fleet(10, 200, policy), visits), 100) for policy in list(Policy)[:2])
    assert even["imbalance"] < 1.01
    assert even["hit_rate"] < 0.3 * own["hit_rate"]
    assert sum(even["requests"]) == even["visits"]


def test_a_server_that_is_lost_loses_its_users_alone_and_comes_back_empty():
    visits = draw_visits(Visitors(5000), rate=100, seconds=300, seed=4)
    changes = (Change(100, 0, is_up=False), Change(200, 0, is_up=True))
    fleet = Fleet(4, 3000, changes=changes, warm_seconds=0.01, cold_seconds=0.03)
    simulation = Simulation(fleet, visits)
    simulation.run()
    simulation.check()
    untouched = simulate(Fleet(4, 3000, warm_seconds=0.01, cold_seconds=0.03), visits)
    servers, before = np.array(simulation.servers), np.array(untouched.servers)
    lost = (visits.seconds >= 100) & (visits.seconds < 200)
    assert not (servers[lost] == 0).any()
    assert (servers[~lost] == before[~lost]).all()
    assert (before[servers != before] == 0).all()
    users = np.unique(visits.users)
    assert count_moved(simulation.rings[0], simulation.rings[1], users) == pytest.approx(1 / 4, abs=0.05)
    assert count_moved(simulation.rings[0], simulation.rings[2], users) == 0
    times, rates = follow_hits(simulation, 10)
    at = dict(zip(times, rates, strict=True))
    assert at[105] < at[95] - 0.05  # those who moved are encoded again
    assert at[205] < at[195] - 0.02  # and so are those who come back
    assert at[175] == pytest.approx(at[95], abs=0.1)


def test_a_server_that_joins_was_not_there_before():
    visits = make_visits(list(range(200)))
    simulation = simulate(Fleet(3, 10, changes=(Change(100, 2, is_up=True),)), visits)
    simulation.check()
    assert 2 not in list(simulation.servers)[:100]
    assert 2 in list(simulation.servers)[100:]


def test_the_last_server_cannot_leave():
    with pytest.raises(PerfError, match="a server that stays"):
        simulate(Fleet(1, 10, changes=(Change(1, 0, is_up=False),)), make_visits([1, 2, 3]))


def test_a_simulation_notices_a_request_that_got_lost():
    simulation = simulate(Fleet(2, 10, warm_seconds=1, cold_seconds=1), make_visits([1, 2, 3]))
    simulation.check()
    simulation.in_flight[0] += 1
    with pytest.raises(AssertionError, match="in flight"):
        simulation.check()


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet(0, 10),
        Fleet(2, -1),
        Fleet(2, 10, factor=1),
        Fleet(2, 10, points=0),
        Fleet(2, 10, warm_seconds=2, cold_seconds=1),
        Fleet(2, 10, changes=(Change(1, 2, is_up=False),)),
        Fleet(2, 10, changes=(Change(2, 0, is_up=False), Change(1, 1, is_up=False))),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(fleet):
    with pytest.raises(PerfError, match="expected"):
        Simulation(fleet, make_visits([1]))


def test_a_million_visits_take_seconds():
    """Measured on a twentieth: millions of users and visits are to take less than a minute."""
    begun = time.process_time()
    visits = draw_visits(Visitors(2_000_000), rate=400, seconds=125, seed=0)
    simulate(Fleet(20, 1000, Policy.BOUNDED, warm_seconds=0.0142, cold_seconds=0.0475), visits)
    assert 40_000 < len(visits) < 60_000
    assert 20 * (time.process_time() - begun) < 60


# ---- visits ---------------------------------------------------------------------------------------------------------


def test_visits_are_as_described():
    visitors = Visitors(1000, 1.0, returns=0.6, page_seconds=10, unchanged=0.3)
    visits = draw_visits(visitors, rate=100, seconds=2000, seed=1)
    assert len(visits) == pytest.approx(200_000, rel=0.02)
    assert 0 <= visits.seconds[0] <= visits.seconds[-1] < 2000
    assert (visits.seconds < 100).sum() == pytest.approx(10_000, rel=0.1)  # at full rate from the start
    counts = np.bincount(visits.users)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)
    # Contents belong to one user; with everybody kept for ever, what is found is what returns or is unchanged.
    owners = {}
    for user, content in zip(visits.users.tolist(), visits.contents.tolist(), strict=True):
        assert owners.setdefault(content, user) == user
    found = summarise(simulate(Fleet(1, 1e9), visits), 500)["hit_rate"]
    assert found == pytest.approx(visitors.highest_hit_rate, abs=0.02)


def test_the_seed_decides_the_visits():
    first, again, other = (draw_visits(Visitors(1000), 10, 100, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.contents, again.contents)
    assert len(first) != len(other) or (first.users != other.users).any()


def test_a_trace_is_read_in_order_of_time(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("user,seconds,content,size\nanna,2,h1,10\nbert,0.5,h1,20\nanna,3,h1,10\nanna,4,h2,12\n")
    visits = read_visits(path)
    assert visits.seconds.tolist() == [0.5, 2, 3, 4]
    assert len(set(visits.users.tolist())) == 2
    simulation = simulate(Fleet(1, 100), visits)
    assert [bool(hit) for hit in simulation.is_hit] == [False, False, True, False]
    assert simulation.caches[0].held == 42
    path.write_text("user,seconds\n7,1\n7,2\n")
    assert [bool(hit) for hit in simulate(Fleet(1, 1), read_visits(path)).is_hit] == [False, True]


@pytest.mark.parametrize("text", ["", "user,seconds\n", "who,when\n1,2\n", "user,seconds\n1,noon\n"])
def test_what_is_no_trace_is_refused(text, tmp_path):
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(PerfError, match="expected CSV with the columns"):
        read_visits(tmp_path / "trace.csv")


# ---- the command ----------------------------------------------------------------------------------------------------

KEPT = str(Path(__file__).parents[2] / "perf" / "results" / "bench-kept.json")


def test_the_command_replays_a_trace(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("seconds,user\n" + "".join(f"{second},{second % 5}\n" for second in range(100)))
    command = ["simulate", "--from", KEPT, "--servers", "3", "--budget", "5", "--trace", str(path)]
    assert main([*command, "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["affinity"]["hit_rate"] == 0.95  # everybody once
    assert rows["round-robin"]["hit_rate"] == 0.85  # everybody once on each server
    assert main([*command, "--lose", "50"]) == 0
    assert "users with another server since one was lost" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "none.csv")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_small_study_has_every_part_and_its_report(tmp_path, monkeypatch, capsys):
    for name, value in (("SERVERS", 3), ("BUDGET", 20), ("BUDGETS", (10, 20)), ("SIZES", (1, 3)), ("RINGS", 2)):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "LOSSES", ((1, Policy.BOUNDED), (2, Policy.BOUNDED), (1, Policy.AFFINITY)))
    command = ["simulate", "--study", "--from", KEPT, "--users", "500", "--seconds", "200", "--results", str(tmp_path)]
    assert main(command) == 0
    assert "written" in capsys.readouterr().out
    result = json.loads((tmp_path / "fleet.json").read_text())
    assert result["command"] == "kvcast perf simulate --study --seconds 200 --users 500"
    assert result["loss"][0]["moved"] == pytest.approx(1 / 3, abs=0.1)
    text = (tmp_path / "fleet.md").read_text()
    for plot in ("budget", "servers", "factor", "loss"):
        assert f"fleet-{plot}.png" in text
        assert (tmp_path / f"fleet-{plot}.png").stat().st_size > 10_000
    with pytest.raises(PerfError, match="expected enough to fill caches"):
        study.Study(Visitors(500), Fleet(3, 1e6), 20, 0).measure(budget=1e6)

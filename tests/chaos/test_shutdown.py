"""SIGTERM under load: accepted requests are answered, later ones rejected with the reason, and no process is left."""

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.processes import find_children, is_running, list_shared_memory, read_until, run_serve, wait_until
from tests.support import choose_cases

DRAIN_SECONDS = 10
BOUND_SECONDS = DRAIN_SECONDS + 6
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def end_what_a_failing_test_leaves():
    """A test that fails halfway leaves no server."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
            process.wait(BOUND_SECONDS + DRAIN_SECONDS)
    STARTED.clear()


@pytest.mark.parametrize(("model", "protocol"), choose_cases(("ranker", "ranker_resident"), ("grpc", "http")))
def test_accepted_requests_are_answered_at_shutdown(tiny_repository, protocol, model):
    regions = list_shared_memory()
    process, addresses = start(tiny_repository, model)
    started = find_children(process.pid)
    requests = draw_requests()
    expected = expect(requests, record_answers(addresses["grpc"], requests, model))
    with Load(addresses[protocol], expected, model, protocol, threads=12, deadline=30) as load:
        load.wait_for(100)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(BOUND_SECONDS)
    process.communicate()
    assert process.returncode == 0
    assert set(load.count()) <= {"right", "TryAgainError"}, load.count()
    there = [each for each in load.outcomes if each.sent < told - 0.05]
    assert {each.what for each in there} == {"right"}, [each for each in there if each.what != "right"]
    refused = [each for each in load.outcomes if each.what != "right"]
    # What arrives while gRPC closes is CANCELLED by its library, before the gateway sees it.
    clear = r"stopping|(?i:connect)|(?i:socket closed)|CANCELLED"
    unclear = [each for each in refused if not re.search(clear, each.message)]
    assert not unclear, {each.message for each in unclear}
    assert not [pid for pid in started if is_running(pid)]
    assert list_shared_memory() <= regions


def test_requests_beyond_the_drain_time_are_rejected_and_not_lost(tiny_repository):
    """A queue longer than the drain: every request is answered or refused, and nothing waits for the whole queue."""
    process, addresses = start(tiny_repository, "ranker ranker_full", "--drain-seconds", "0.5")
    requests = draw_requests(8, length=60)
    expected = expect(requests, record_answers(addresses["grpc"], requests, "ranker_full"))
    with Load(addresses["grpc"], expected, "ranker_full", threads=48, deadline=30) as load:
        load.wait_for(40)
        process.send_signal(signal.SIGTERM)
        process.wait(BOUND_SECONDS)
    process.communicate()
    assert set(load.count()) == {"right", "TryAgainError"}, load.count()


@pytest.mark.parametrize("protocol", [case for (case,) in choose_cases(("grpc", "http"))])
def test_readiness_is_false_before_requests_are_rejected_at_shutdown(tiny_repository, protocol):
    """Long enough for a proxy's health check to see it; requests in the meantime are answered."""
    process, addresses = start(tiny_repository, "ranker_resident", "--leave-seconds", "2")
    requests = draw_requests(8)
    expected = expect(requests, record_answers(addresses["grpc"], requests, "ranker_resident"))
    with Load(addresses[protocol], expected, "ranker_resident", protocol, threads=4, deadline=30) as load:
        load.wait_for(20)
        assert read_readiness(addresses["http"]) == (200, "")
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: read_readiness(addresses["http"]) == (503, "the server is stopping"), 2)
        load.wait_for(4, 2)  # requests that arrive while it leaves
        process.wait(2 + BOUND_SECONDS)
    process.communicate()
    assert process.returncode == 0
    came = [each for each in load.outcomes if each.sent < told + 1.8]
    assert {each.what for each in came} == {"right"}, [each for each in came if each.what != "right"]


def read_readiness(address: str) -> tuple[int, str]:
    """Return the status, and the reason for not being ready."""
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as reply:
            return reply.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def start(repository, model: str, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    process = run_serve(repository, "--models", model, "--drain-seconds", str(DRAIN_SECONDS), *arguments)
    STARTED.append(process)
    http = read_until(process, "  HTTP").split("//")[1].strip()
    grpc = read_until(process, "  gRPC").split()[-1]
    read_until(process, "Ctrl-C")
    drain_output(process)
    return process, {"http": http, "grpc": grpc}


def drain_output(process: subprocess.Popen[str]) -> None:
    """Read its output, so that the server is not blocked by a full pipe."""
    import threading  # noqa: PLC0415

    assert process.stdout is not None
    threading.Thread(target=process.stdout.read, daemon=True).start()

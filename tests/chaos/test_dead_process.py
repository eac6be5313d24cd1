"""Model processes that are killed or stopped under load: replaced in seconds, and no caller sees it."""

import dataclasses
import os
import signal
import urllib.request

import pytest

from kvcast.client import NO_RETRIES
from kvcast.client.probe import main as probe
from kvcast.server import TritonServer, supervisor
from kvcast.server.stubs import list_stubs
from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.conftest import make_settings
from tests.processes import read_state, wait_until
from tests.support import choose_cases

# Tenths of a second; where a kill leaves tritonserver hanging, it is ended after some seconds and started again.
REPAIRED_WITHIN_SECONDS = 18
NOTICED_WITHIN_SECONDS = 10


@pytest.fixture(scope="module")
def guarded(tiny_repository):
    """A server of this module's own, since its processes are killed."""
    with TritonServer(dataclasses.replace(make_settings(tiny_repository), models=["ranker", "ranker_resident"])) as own:
        yield own


@pytest.fixture(scope="module")
def requests():
    return draw_requests()


def hit(server: TritonServer, model: str, number: signal.Signals) -> None:
    assert server.pid
    stub = next(each for each in list_stubs(server.pid).values() if each.model == model)
    os.kill(stub.pid, number)


@pytest.mark.parametrize(
    ("victim", "number", "protocol"),
    choose_cases(("user_encoder", "doc_fusion", "ranker_resident"), (signal.SIGKILL, signal.SIGSTOP), ("grpc", "http")),
)
def test_a_process_that_dies_under_load_is_replaced_without_errors(guarded, requests, victim, number, protocol):
    asked = "ranker_resident" if victim == "ranker_resident" else "ranker"
    expected = expect(requests, record_answers(guarded.grpc_address, requests, asked))
    address = guarded.grpc_address if protocol == "grpc" else guarded.http_address
    before = read_state(guarded)
    with Load(address, expected, asked, protocol, retry=NO_RETRIES) as load:
        load.wait_for(100)
        hit(guarded, victim, number)
        wait_until(lambda: read_state(guarded)["deaths"] != before["deaths"], NOTICED_WITHIN_SECONDS)
        assert read_state(guarded)["repairs"] > before["repairs"] or not read_state(guarded)["is_ready"]
        wait_until(lambda: read_state(guarded)["repairs"] > before["repairs"], REPAIRED_WITHIN_SECONDS)
        load.wait_for(100)
    assert set(load.count()) == {"right"}, [each for each in load.outcomes if each.what != "right"][:5]
    assert read_state(guarded)["is_ready"]


def test_a_repair_that_hangs_is_ended(guarded, requests, monkeypatch):
    """Tritonserver can hang after a process died; here it is stopped."""
    monkeypatch.setattr(supervisor, "LEAST_REPAIR_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "REPAIR_STARTS", 0)
    expected = expect(requests, record_answers(guarded.grpc_address, requests))
    before = read_state(guarded)
    with Load(guarded.grpc_address, expected, retry=NO_RETRIES) as load:
        load.wait_for(50)
        os.kill(guarded.pid, signal.SIGSTOP)
        hit(guarded, "user_encoder", signal.SIGKILL)
        wait_until(lambda: read_state(guarded)["restarts"] > before["restarts"], REPAIRED_WITHIN_SECONDS)
        load.wait_for(50)
    assert set(load.count()) == {"right"}, [each for each in load.outcomes if each.what != "right"][:5]
    assert read_state(guarded)["is_ready"]


def test_readiness_is_false_while_a_process_is_dead(guarded, own_repository, capsys):
    """An artefact that cannot be loaded again keeps the model down: that is said, until the cause is gone."""
    settings = dataclasses.replace(make_settings(own_repository), models=["ranker"])
    with TritonServer(settings) as server:
        arguments = ["--address", server.grpc_address]
        assert probe(arguments) == 0
        graph = own_repository / "doc_fusion" / "1" / "model.onnx"
        whole = graph.read_bytes()
        graph.write_bytes(whole[:-100])
        hit(server, "doc_fusion", signal.SIGKILL)
        wait_until(lambda: "SHA-256" in read_state(server)["reason"], 10)
        assert probe(arguments) != 0
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://{server.http_address}/v2/health/ready", timeout=5)
        graph.write_bytes(whole)
        wait_until(lambda: read_state(server)["is_ready"], 15)
        assert probe([*arguments, "--wait", "5"]) == 0
    capsys.readouterr()


def test_two_instances_of_each_model(own_repository, requests):
    for config in own_repository.glob("*/config.pbtxt"):
        config.write_text(config.read_text().replace("count: 1", "count: 2"))
    with TritonServer(dataclasses.replace(make_settings(own_repository), models=["ranker"])) as server:
        expected = expect(requests, record_answers(server.grpc_address, requests))
        with Load(server.grpc_address, expected) as load:
            load.wait_for(50)
            hit(server, "user_encoder", signal.SIGKILL)
            wait_until(lambda: read_state(server)["repairs"] == 1, REPAIRED_WITHIN_SECONDS)
            load.wait_for(50)
    assert set(load.count()) == {"right"}, load.count()


def test_the_gateway_is_restarted(guarded, requests):
    expected = expect(requests, record_answers(guarded.grpc_address, requests))
    from kvcast.client import RetryPolicy  # noqa: PLC0415

    with Load(guarded.grpc_address, expected, retry=RetryPolicy()) as load:
        load.wait_for(50)
        os.kill(guarded.gateway_pid, signal.SIGKILL)
        load.wait_for(50)
    assert set(load.count()) == {"right"}, load.count()

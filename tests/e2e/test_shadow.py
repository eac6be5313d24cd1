"""The shadow: rankings scored again by the traditional scheme, and what operators read of it."""

import dataclasses
import re
import time
import urllib.request
from pathlib import Path

import pytest

from kvcast.client import RankerClient
from kvcast.protocol.tensors import SCORE_TOLERANCE
from kvcast.server import TritonServer
from tests.chaos.load import draw_requests
from tests.conftest import make_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shadowed(tiny_repository):
    settings = dataclasses.replace(make_settings(tiny_repository), models=["ranker", "ranker_resident"], shadow=1.0)
    with TritonServer(settings) as server:
        yield server


def read_metrics(server: TritonServer) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as reply:
        return reply.read().decode()


def read_value(text: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.parametrize("model", ["ranker", "ranker_resident"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_ranking_is_scored_again_and_the_difference_is_a_metric(shadowed, model, protocol):
    name = 'kvcast_shadow_requests_total{outcome="scored"}'
    before = read_value(read_metrics(shadowed), name)
    address = shadowed.grpc_address if protocol == "grpc" else shadowed.http_address
    with RankerClient(address, protocol=protocol, model=model) as client:
        for request in draw_requests(4):
            client.rank(*request)
    deadline = time.monotonic() + 20
    while read_value(read_metrics(shadowed), name) == before:
        assert time.monotonic() < deadline, "nothing was scored again"
        time.sleep(0.1)
    text = read_metrics(shadowed)
    assert 0 <= read_value(text, "kvcast_shadow_largest_difference") <= SCORE_TOLERANCE
    assert read_value(text, 'kvcast_shadow_requests_total{outcome="failed"}') == 0


def test_every_metric_that_the_operations_guide_names_is_there(shadowed):
    text = read_metrics(shadowed)
    section = (ROOT / "docs" / "operations.md").read_text().partition("## Metrics")[2]
    names = set(re.findall(r"`(kvcast_(?:gateway|ready|process|repairs|restarts|active|refused|shadow)\w*)", section))
    assert len(names) > 10
    for name in names:
        assert re.search(rf"^# TYPE {name} ", text, re.MULTILINE), name

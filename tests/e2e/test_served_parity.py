"""Served: `ranker` = `ranker_full` = the independent implementation, over both protocols, sync and asyncio."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvcast.client import AsyncRankerClient, RankerClient
from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog
from tests.parity.reference import score_candidates
from tests.support import EXPORTED_TOML, TOLERANCE, make_network

CONFIG = load_config(str(EXPORTED_TOML))
PROTOCOLS = ("grpc", "http")


def address_of(server: TritonServer, protocol: str) -> str:
    return server.grpc_address if protocol == "grpc" else server.http_address


def make_client(server: TritonServer, protocol: str, model: str = "ranker") -> RankerClient:
    return RankerClient(address_of(server, protocol), protocol=protocol, model=model)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("length", "count"), [(0, 3), (1, 1), (40, 10), (96, 64)])
def test_ranker_equals_ranker_full_and_the_independent_implementation(server, protocol, length, count):
    request = ClickLog(CONFIG.schema, seed=length).draw_request(length, count)
    with make_client(server, protocol) as shared, make_client(server, protocol, "ranker_full") as full:
        scores = shared.rank(request.history, request.candidates).scores
        np.testing.assert_allclose(
            scores, full.rank(request.history, request.candidates).scores, rtol=0, atol=TOLERANCE
        )
    weights = {name: value.numpy() for name, value in make_network(CONFIG, seed=0).state_dict().items()}
    few = request.candidates[:4]
    reference = score_candidates(weights, CONFIG, request.history, few)
    np.testing.assert_allclose(scores[:4], reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_together_alone_permuted_and_padded_agree(server, protocol):
    log = ClickLog(CONFIG.schema, seed=11)
    history, candidates = log.draw_history(30), log.draw_candidates(12)
    order = np.random.default_rng(0).permutation(12)
    padded = np.insert(history, [0, 0, 7, 30], 0, axis=0)
    with make_client(server, protocol) as client:
        scores = client.rank(history, candidates).scores
        alone = [client.rank(history, candidates[[index]]).scores[0] for index in range(12)]
        permuted = client.rank(history, candidates[order]).scores
        with_padding = client.rank(padded, candidates).scores
        nothing = client.rank([], candidates).scores
        only_padding = client.rank(np.zeros((9, 2), np.int64), candidates).scores
    np.testing.assert_allclose(scores, alone, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores[order], permuted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores, with_padding, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(nothing, only_padding)
    assert np.abs(nothing - scores).max() > 1e-3, "the history must matter"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_concurrent_users_with_different_lengths_get_their_own_scores(server, protocol):
    """Requests that meet in a Triton batch, from threads sharing one client."""
    log = ClickLog(CONFIG.schema, seed=5)
    lengths = np.random.default_rng(5).integers(0, 90, 48)
    requests = [log.draw_request(int(length), 1 + int(length) % 20) for length in lengths]
    with make_client(server, protocol) as client, make_client(server, protocol, "ranker_full") as full:
        expected = [full.rank(request.history, request.candidates).scores for request in requests]
        with ThreadPoolExecutor(12) as pool:
            rankings = list(pool.map(lambda request: client.rank(request.history, request.candidates), requests))
    for ranking, scores in zip(rankings, expected, strict=True):
        np.testing.assert_allclose(ranking.scores, scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_asyncio_client_gives_the_same_scores(server, protocol):
    log = ClickLog(CONFIG.schema, seed=6)
    requests = [log.draw_request(length, 7) for length in (0, 10, 20, 90)]

    async def rank_all() -> list[np.ndarray]:
        async with AsyncRankerClient(address_of(server, protocol), protocol=protocol) as client:
            rankings = await asyncio.gather(*(client.rank(each.history, each.candidates) for each in requests))
            return [ranking.scores for ranking in rankings]

    with make_client(server, protocol) as client:
        for scores, request in zip(asyncio.run(rank_all()), requests, strict=True):
            expected = client.rank(request.history, request.candidates).scores
            np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)

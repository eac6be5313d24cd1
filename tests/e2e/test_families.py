"""The second family, exported and served: all ways to its scores, cache hits, and perf."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcast.client import RankerClient
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.protocol.config import load_config
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.report import CacheResult
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import EXPORTED_MODELS
from kvcast.server import TritonServer
from kvcast.serving import DocFusion, FullRanker, UserEncoder
from kvcast.serving.artefact import SessionOptions
from kvcast.serving.doc_fusion import FusionJob
from kvcast.serving.packing import strip_padding
from kvcast.synthetic import ClickLog
from perf.baselines.race import Field
from perf.experiments import run_peers
from tests.conftest import make_settings
from tests.e2e.test_served_parity import PROTOCOLS, make_client
from tests.parity.hstu_reference import score_candidates
from tests.support import TOLERANCE, make_network

CONFIG = load_config("tiny-hstu")


@pytest.fixture(scope="module")
def hstu_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("hstu") / "repository"
    export_release(CONFIG, WeightsSource(seed=0), repository, say=lambda _: None)
    return repository


@pytest.fixture(scope="module")
def hstu_server(hstu_repository: Path) -> Iterator[TritonServer]:
    with TritonServer(make_settings(hstu_repository)) as running:
        yield running


def draw_request(length: int, count: int, seed: int) -> RankRequest:
    """Return a request whose events have rising times, some unknown."""
    request = ClickLog(CONFIG.schema, seed).draw_request(length, count)
    draw = np.random.default_rng(seed)
    hours = draw.integers(1, 400_000) + draw.exponential(30, length).astype(np.int64).cumsum()
    request.history[:, 2] = np.where(draw.random(length) < 0.1, 0, hours)
    return request


def score_reference(request: RankRequest) -> np.ndarray:
    weights = {name: value.numpy() for name, value in make_network(CONFIG, seed=0).state_dict().items()}
    return score_candidates(weights, CONFIG, request.history, request.candidates[:3])


def test_the_export_was_proved(hstu_repository):
    for model in EXPORTED_MODELS:
        manifest = read_manifest(hstu_repository / model.name / "1")
        assert manifest.network_options == {"time_field": "hour"}
        assert 0 < manifest.parity.onnx <= TOLERANCE
        assert manifest.parity.undirected_difference > 1e-3
        assert (manifest.user_kv.lead_slots, manifest.user_kv.key_rows, manifest.user_kv.value_columns) == (0, 17, 16)


def test_a_ragged_batch_of_users_gets_the_scores_of_the_independent_implementation(hstu_repository):
    """As the models run it: padding stripped or between events, users packed into one run, KV padded to share one."""
    encoder, fusion, full = (
        kind.open(hstu_repository / kind.spec.name / "1", SessionOptions())
        for kind in (UserEncoder, DocFusion, FullRanker)
    )
    sizes = [(0, 3, 2), (1, 5, 0), (17, 1, 4), (40, 9, 0), (25, 4, 1)]
    requests = [draw_request(length, count, seed) for seed, (length, count, _) in enumerate(sizes)]
    encoded = encoder.encode([strip_padding(request.history) for request in requests])
    jobs = [FusionJob(kv, request.candidates[None]) for kv, request in zip(encoded, requests, strict=True)]
    for request, (scores,), (length, _, padding) in zip(requests, fusion.score(jobs), sizes, strict=True):
        np.testing.assert_allclose(scores[:3], score_reference(request), rtol=0, atol=TOLERANCE)
        places = np.random.default_rng(length).integers(0, length + 1, padding)
        padded = np.insert(request.history, places, 0, axis=0)
        if len(padded):
            expected = full.score(padded, request.candidates)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_served_way_gives_the_scores_of_the_independent_implementation(hstu_server, protocol):
    with (
        make_client(hstu_server, protocol) as shared,
        make_client(hstu_server, protocol, "ranker_resident") as resident,
        make_client(hstu_server, protocol, "ranker_full") as full,
    ):
        for length, count in ((0, 3), (1, 1), (40, 10), (96, 64)):
            request = draw_request(length, count, seed=2 * length + PROTOCOLS.index(protocol))
            expected = full.rank(request.history, request.candidates).scores
            np.testing.assert_allclose(expected[:3], score_reference(request), rtol=0, atol=TOLERANCE)
            for client in (shared, resident):
                for cache in (CacheResult.MISS, CacheResult.HIT):
                    ranking = client.rank(request.history, request.candidates, report=True)
                    np.testing.assert_allclose(ranking.scores, expected, rtol=0, atol=TOLERANCE)
                    assert ranking.report is not None
                    assert ranking.report.cache is cache or length == 0, "the empty history is shared"


def test_together_alone_permuted_and_padded_agree(hstu_server):
    request = draw_request(30, 12, seed=11)
    history, candidates = request.history, request.candidates
    order = np.random.default_rng(0).permutation(12)
    padded = np.insert(history, [0, 0, 7, 30], 0, axis=0)
    with RankerClient(hstu_server.grpc_address) as client:
        scores = client.rank(history, candidates).scores
        alone = [client.rank(history, candidates[[index]]).scores[0] for index in range(12)]
        permuted = client.rank(history, candidates[order]).scores
        with_padding = client.rank(padded, candidates).scores
        nothing = client.rank([], candidates).scores
    np.testing.assert_allclose(scores, alone, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores[order], permuted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores, with_padding, rtol=0, atol=TOLERANCE)
    assert np.abs(nothing - scores).max() > 1e-3, "the history must matter"


def test_perf_races_the_baselines_that_run_this_network_and_names_the_others(hstu_repository):
    said: list[str] = []
    field = Field("tiny-hstu", hstu_repository, threads=1, seed=0)
    (row,) = run_peers(field, CONFIG, [5], 1, ["shared", "traditional", "torch_flash"], said.append)
    assert set(row["peers"]) == {"shared", "traditional"}
    assert row["peers"]["traditional"]["score_difference"] <= TOLERANCE
    assert said[0] == "    not for hstu, left out: torch_flash"

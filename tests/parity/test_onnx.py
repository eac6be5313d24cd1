"""The exported ONNX graphs, run as the models run them, against the monolith and the independent implementation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.export.calls import OnnxCalls
from kvcast.export.release import fingerprint_release
from kvcast.export.template import open_session, write_graphs
from kvcast.export.trace import trace_model
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import load_config
from kvcast.protocol.tensors import DOC_FUSION, RANKER_FULL, USER_ENCODER
from kvcast.serving import DocFusion, FullRanker, UserEncoder
from kvcast.serving.artefact import SessionOptions
from kvcast.serving.doc_fusion import FusionJob
from kvcast.serving.model import Request
from kvcast.serving.packing import strip_padding
from kvcast.serving.user_kv import KVArrays
from tests.parity.reference import score_candidates
from tests.support import EXPORTED_TOML, TOLERANCE, draw_request, make_config, make_network


@pytest.fixture(scope="module")
def network() -> RankingNetwork:
    return make_network(load_config(str(EXPORTED_TOML)), seed=0)


@pytest.fixture(scope="module")
def models(tiny_repository: Path) -> dict[str, Any]:
    folders = {kind: tiny_repository / kind.spec.name / "1" for kind in (UserEncoder, DocFusion, FullRanker)}
    return {kind.__name__: kind.open(folder, SessionOptions()) for kind, folder in folders.items()}


def rank_batch(models: dict[str, Any], requests: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Rank requests as one Triton batch would be: encoded together, fused together."""
    encoded = models["UserEncoder"].encode([strip_padding(history) for history, _ in requests])
    jobs = [FusionJob(kv, candidates[None]) for kv, (_, candidates) in zip(encoded, requests, strict=True)]
    return [scores[0] for scores in models["DocFusion"].score(jobs)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_ragged_batch_of_users_gets_the_scores_of_the_independent_implementation(models, network, sizes, seed):
    config = network.config
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    requests = []
    for offset, (length, count, padding) in enumerate(sizes):
        history, candidates = draw_request(config, length, count, seed + offset)
        places = np.random.default_rng(seed).integers(0, length + 1, padding)
        requests.append((np.insert(history, places, 0, axis=0), candidates))
    for (history, candidates), scores in zip(requests, rank_batch(models, requests), strict=True):
        few = slice(0, 3)  # the float64 loop is slow
        reference = score_candidates(weights, config, history, candidates[few])
        np.testing.assert_allclose(scores[few], reference, rtol=0, atol=TOLERANCE)
        full = models["FullRanker"].score(strip_padding(history), candidates)
        np.testing.assert_allclose(scores, full, rtol=0, atol=TOLERANCE)


def test_packed_runs_equal_single_runs(models, network, monkeypatch):
    """Whatever the packing policy, scores agree: everything in one run, and nothing."""
    config = network.config
    requests = [draw_request(config, length, count, length) for length, count in ((30, 4), (3, 9), (17, 1), (0, 5))]
    results = []
    for bound in (0, 1 << 20):
        monkeypatch.setattr(models["UserEncoder"], "_events_per_run", bound)
        monkeypatch.setattr("kvcast.serving.doc_fusion.SLOTS_PER_CPU_RUN", bound)
        results.append(rank_batch(models, requests))
    for alone, packed in zip(*results, strict=True):
        np.testing.assert_allclose(alone, packed, rtol=0, atol=TOLERANCE)


def test_a_request_of_several_users_with_different_padding(models, network):
    """One request, three users on the batch axis: their KV leaves in one padded rectangle."""
    config, encoder, fusion = network.config, models["UserEncoder"], models["DocFusion"]
    histories, candidates = zip(*(draw_request(config, 20, 6, seed) for seed in range(3)), strict=True)
    stacked = np.stack(histories)
    stacked[1, 5:] = 0
    stacked[2] = 0
    job = encoder.check(Request({"history": stacked}, ["user_keys", "user_values", "kv_id"]))
    (kv,) = encoder.run([job])
    (scores,) = fusion.run([fusion.check(Request({**kv, "candidates": np.stack(candidates)}, ["scores"]))])
    for user in range(3):
        expected = models["FullRanker"].score(strip_padding(stacked[user]), candidates[user])
        np.testing.assert_allclose(scores["scores"][user], expected, rtol=0, atol=TOLERANCE)


def test_user_kv_is_the_same_bits_whatever_the_candidates(models, network):
    history, candidates = draw_request(network.config, 25, 8, seed=5)
    before: KVArrays = models["UserEncoder"].encode([history])[0]
    kept = before.keys.copy(), before.values.copy()
    models["DocFusion"].score([FusionJob(before, candidates[None])])
    after = models["UserEncoder"].encode([history])[0]
    assert np.array_equal(before.keys, kept[0]), "fusion must not write into the KV that it is given"
    assert np.array_equal(before.values, kept[1]), "fusion must not write into the KV that it is given"
    assert np.array_equal(before.keys, after.keys)
    assert np.array_equal(before.values, after.values)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 3, "head_width": 4, "history_fields": 1, "candidate_fields": 1},
        {"heads": 1, "head_width": 16, "history_fields": 3, "candidate_fields": 6},
    ],
    ids=lambda sizes: f"H{sizes['heads']}_T{sizes['candidate_fields']}",
)
def test_graphs_of_other_sizes(sizes, tmp_path):
    config = make_config(layers=1, **sizes)  # several layers: `models`
    network = make_network(config, seed=3)
    looked_at = (USER_ENCODER.name, DOC_FUSION.name, RANKER_FULL.name)  # the resident graph takes longer than all three
    with torch.inference_mode():
        templates = [trace_model(network, model).template for model in looked_at]
        write_graphs(templates, network, fingerprint_release(network), tmp_path)
    calls = OnnxCalls({model: open_session(tmp_path / model / "model.onnx") for model in looked_at})
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    for length, count, seed in ((1, 1, 0), (40, 7, 1), (13, 3, 2)):
        history, candidates = draw_request(config, length, count, seed)
        reference = score_candidates(weights, config, history, candidates)
        shared = calls.rank(history[None], candidates[None])[0]
        np.testing.assert_allclose(shared, reference, rtol=0, atol=TOLERANCE)
        monolith = calls.run_monolith(history[None], candidates[None])[0]
        np.testing.assert_allclose(monolith, reference, rtol=0, atol=TOLERANCE)

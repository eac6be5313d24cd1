"""Releases that share a `kv_id` read each other's user KV, and each gives its own scores; others refuse it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcast.export.graphs import describe_graphs, export_graph
from kvcast.export.pipeline import _describe
from kvcast.export.release import fingerprint_kv, fingerprint_release
from kvcast.networks.interface import SHORT_NAMES, RankingNetwork
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.manifest import MANIFEST_FILE, ONNX_FILE, Parity
from kvcast.serving import DocFusion, UserEncoder
from kvcast.serving.artefact import SessionOptions
from kvcast.serving.model import Request
from tests.support import TOLERANCE, draw_request, make_config, make_network

CONFIG = make_config(layers=1)  # the quickest to trace; tests/unit/test_release.py looks at deeper ones
SHARED = ("user_keys", "user_values", "kv_id")


@dataclasses.dataclass(frozen=True)
class Side:
    """A release as it is served: both models on real graphs, and the network that they came from."""

    network: RankingNetwork
    encoder: UserEncoder
    fusion: DocFusion

    @property
    def ids(self) -> tuple[str, str]:
        """`release` and `kv_id`."""
        manifests = self.encoder.artefact.manifest, self.fusion.artefact.manifest
        assert len({(manifest.release, manifest.kv_id) for manifest in manifests}) == 1
        return manifests[0].release, manifests[0].kv_id

    def encode(self, history: np.ndarray) -> dict[str, Any]:
        return self.encoder.run([self.encoder.check(Request({"history": history[None]}, SHARED))])[0]

    def fuse(self, user_kv: dict[str, Any], candidates: np.ndarray) -> np.ndarray:
        request = Request({**user_kv, "candidates": candidates[None]}, ["scores"])
        return self.fusion.run([self.fusion.check(request)])[0]["scores"][0]

    def rank(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Score by full recomputation, in torch."""
        return self.network(torch.from_numpy(history[None]), torch.from_numpy(candidates[None]))[0].numpy()


@torch.inference_mode()
def export_side(config: ModelConfig, folder: Path, changed: str = "") -> Side:
    """Export what the two models need; the weight of that name is another than in other sides."""
    network = make_network(config)
    for name, weight in network.named_parameters():
        if name == changed:
            weight.mul_(1.5)
    release, traced = fingerprint_release(network), {}
    for graph in describe_graphs(network)[:2]:
        (folder / graph.model).mkdir(parents=True)
        traced[graph.model] = export_graph(graph, release, folder / graph.model / ONNX_FILE)
    kv_id = fingerprint_kv(network, traced["user_encoder"].program)
    for model in traced:
        manifest = _describe(network, release, kv_id, Parity(0, 0, 0, 0), model, folder / model)
        (folder / model / MANIFEST_FILE).write_text(manifest.to_json())
    open_options = SessionOptions(provider="cpu")
    return Side(
        network,
        UserEncoder.open(folder / "user_encoder", open_options),
        DocFusion.open(folder / "doc_fusion", open_options),
    )


@pytest.mark.parametrize("family", SHORT_NAMES)
@torch.inference_mode()
def test_user_kv_is_read_by_the_releases_of_its_kv_id_and_by_no_other(family, tmp_path):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=family))
    old = export_side(config, tmp_path / "old")
    other_scoring = export_side(config, tmp_path / "scoring", "types.weight")
    other_user = export_side(config, tmp_path / "user", "embeddings.event_1.weight")
    assert old.ids[0] != other_scoring.ids[0]
    assert old.ids[1] == other_scoring.ids[1]
    assert not set(old.ids) & set(other_user.ids)
    for length, count, seed in ((1, 3, 0), (9, 5, 1), (40, 4, 2)):
        history, candidates = draw_request(config, length, count, seed)
        kv = old.encode(history)
        assert bytes(kv["kv_id"][0]).hex() == old.ids[1]
        scores, others = old.fuse(kv, candidates), other_scoring.fuse(kv, candidates)
        np.testing.assert_allclose(scores, old.rank(history, candidates), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(others, other_scoring.rank(history, candidates), rtol=0, atol=TOLERANCE)
        assert np.abs(scores - others).max() > 100 * TOLERANCE
        for sender, reader in ((old, other_user), (other_user, other_scoring)):
            with pytest.raises(InvalidRequestError, match=r"kv_id: expected user KV of kv_id .* encode the history"):
                reader.fuse(sender.encode(history), candidates)

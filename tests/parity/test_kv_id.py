"""Releases that share a `kv_id` read each other's user KV, and each gives its own scores; others refuse it."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcast.export.pipeline import _describe
from kvcast.export.release import fingerprint_kv, fingerprint_release
from kvcast.export.template import GraphTemplate, write_graphs
from kvcast.export.trace import trace_model
from kvcast.networks.interface import SHORT_NAMES, RankingNetwork
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.manifest import MANIFEST_FILE, Parity
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


def export_sides(config: ModelConfig, folder: Path, *changed: str) -> list[Side]:
    """Export a network, and again with another value for each of these weights in turn; trace it only once."""
    network = make_network(config)
    traced = [trace_model(network, model).template for model in ("user_encoder", "doc_fusion")]
    sides = [write_side(network, traced, folder / "old")]
    for name in changed:
        weight = network.get_parameter(name)
        before = weight.clone()
        weight.mul_(1.5)
        sides.append(write_side(network, traced, folder / name))
        weight.copy_(before)
    return sides


def write_side(network: RankingNetwork, traced: list[GraphTemplate], folder: Path) -> Side:
    """Write what the two models need, with the network's present weights."""
    release, kv_id = fingerprint_release(network), fingerprint_kv(network, traced[0])
    folder.mkdir()
    write_graphs(traced, network, release, folder)
    for each in traced:
        manifest = _describe(network, release, kv_id, Parity(0, 0, 0, 0, release), each.model, folder / each.model)
        (folder / each.model / MANIFEST_FILE).write_text(manifest.to_json())
    options = SessionOptions(provider="cpu")
    encoder, fusion = UserEncoder.open(folder / "user_encoder", options), DocFusion.open(folder / "doc_fusion", options)
    return Side(copy.deepcopy(network), encoder, fusion)


@pytest.mark.parametrize("family", SHORT_NAMES)
@torch.inference_mode()
def test_user_kv_is_read_by_the_releases_of_its_kv_id_and_by_no_other(family, tmp_path):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=family))
    old, other_scoring, other_user = export_sides(config, tmp_path, "types.weight", "embeddings.event_1.weight")
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

"""The three calls of an export candidate, through torch and through its ONNX files, as the proofs see them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from kvcast.contract.manifest import ONNX_FILE
from kvcast.contract.tensors import (
    CANDIDATES,
    DOC_FUSION,
    HISTORY,
    RANKER_FULL,
    RANKER_RESIDENT,
    SCORES,
    USE_KEPT,
    USER_ENCODER,
    USER_KEYS,
    USER_VALUES,
    kept_tensor_name,
    layer_tensor_name,
)
from kvcast.export.proofs import Calls, Floats, Ids
from kvcast.network.interface import MaskKind, RankingNetwork, UserKV


class TorchCalls(Calls):
    """The calls of the network itself. User KV is M keys and then M values."""

    def __init__(self, network: RankingNetwork) -> None:
        self.network = network

    def encode_user(self, history: Ids) -> list[Floats]:
        """Run `encode_user`."""
        user_kv = self.network.encode_user(_to_torch(history))
        return [tensor.numpy() for tensor in user_kv.keys + user_kv.values]

    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """Run `fuse`."""
        tensors = tuple(torch.from_numpy(array) for array in user_kv)
        layers = len(tensors) // 2
        scores = self.network.fuse(UserKV(tensors[:layers], tensors[layers:]), _to_torch(candidates))
        return np.asarray(scores.numpy(), np.float32)

    def rank_resident(
        self, history: Ids, candidates: Ids, kept: list[Floats], *, use_kept: bool
    ) -> tuple[Floats, list[Floats]]:
        """Run `rank`. Its user KV is M keys and then M values, as above."""
        tensors = tuple(torch.from_numpy(array) for array in kept)
        layers = len(tensors) // 2
        scores, made = self.network.rank(
            _to_torch(history),
            _to_torch(candidates),
            UserKV(tensors[:layers], tensors[layers:]),
            torch.tensor(use_kept),
        )
        return np.asarray(scores.numpy(), np.float32), [tensor.numpy() for tensor in made.keys + made.values]

    def run_monolith(self, history: Ids, candidates: Ids, mask: MaskKind = "target_blind") -> Floats:
        """Run `forward`, which also knows the undirected mask."""
        scores = self.network(_to_torch(history), _to_torch(candidates), mask)
        return np.asarray(scores.numpy(), np.float32)

    def probe_user_keys(self, history: Ids, candidates: Ids, mask: MaskKind) -> list[Floats]:
        """Return the user tokens' keys of every layer of the monolith, `[B, N, H, L, dh]`."""
        _, keys = self.network.run_monolith(_to_torch(history), _to_torch(candidates), mask)
        return [key.numpy() for key in keys]


class OnnxCalls(Calls):
    """The calls of the exported files in `folder/<model>/model.onnx`. User KV is the two stacked tensors."""

    def __init__(self, folder: Path) -> None:
        self._sessions = {
            model: ort.InferenceSession(folder / model / ONNX_FILE, providers=["CPUExecutionProvider"])
            for model in (USER_ENCODER.name, DOC_FUSION.name, RANKER_RESIDENT.name, RANKER_FULL.name)
        }

    def encode_user(self, history: Ids) -> list[Floats]:
        """Run `user_encoder`."""
        names = [USER_KEYS.name, USER_VALUES.name]
        return list(self._sessions[USER_ENCODER.name].run(names, {HISTORY.name: history}))

    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """Run `doc_fusion`, a view of each layer as its input."""
        feeds: dict[str, npt.NDArray[np.generic]] = {CANDIDATES.name: np.ascontiguousarray(candidates)}
        for spec, stacked in zip((USER_KEYS, USER_VALUES), user_kv, strict=True):
            for layer in range(stacked.shape[1]):
                feeds[layer_tensor_name(spec, layer)] = stacked[:, layer]
        (scores,) = self._sessions[DOC_FUSION.name].run(None, feeds)
        return np.asarray(scores)

    def rank_resident(
        self, history: Ids, candidates: Ids, kept: list[Floats], *, use_kept: bool
    ) -> tuple[Floats, list[Floats]]:
        """Run `ranker_resident`. Its user KV is M keys and then M values."""
        layers = len(kept) // 2
        names = [(spec, layer) for spec in (USER_KEYS, USER_VALUES) for layer in range(layers)]
        feeds: dict[str, npt.NDArray[np.generic]] = {
            kept_tensor_name(*name): array for name, array in zip(names, kept, strict=True)
        }
        feeds |= {HISTORY.name: history, CANDIDATES.name: np.ascontiguousarray(candidates)}
        outputs = [SCORES.name, *(layer_tensor_name(*name) for name in names)]
        session = self._sessions[RANKER_RESIDENT.name]
        scores, *made = session.run(outputs, {**feeds, USE_KEPT: np.array(use_kept)})
        return np.asarray(scores), list(made)

    def run_monolith(self, history: Ids, candidates: Ids) -> Floats:
        """Run `ranker_full`."""
        feeds = {HISTORY.name: history, CANDIDATES.name: candidates}
        (scores,) = self._sessions[RANKER_FULL.name].run(None, feeds)
        return np.asarray(scores)


def _to_torch(ids: Ids) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids))

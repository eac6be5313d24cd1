"""The three calls of an export candidate, through torch and through its ONNX files, as the proofs see them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from kvcast.export.proofs import Calls, Floats, Ids
from kvcast.export.template import open_session
from kvcast.networks.interface import MaskKind, RankingNetwork, UserKV
from kvcast.protocol.manifest import ONNX_FILE
from kvcast.protocol.tensors import (
    CANDIDATES,
    DOC_FUSION,
    EXPORTED_MODELS,
    HISTORY,
    RANKER_FULL,
    RANKER_RESIDENT,
    SCORES,
    USE_PAST,
    USER_ENCODER,
    USER_KEYS,
    USER_VALUES,
    TensorSpec,
    layer_tensor_name,
    past_tensor_name,
)

Feeds = dict[str, npt.NDArray[Any]]


class TorchCalls(Calls):
    """The calls of the network itself."""

    def __init__(self, network: RankingNetwork) -> None:
        self.network = network

    def encode_user(self, history: Ids) -> list[Floats]:
        """Run `encode_user`."""
        return _to_arrays(self.network.encode_user(_to_torch(history)))

    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """Run `fuse`."""
        scores = self.network.fuse(_to_user_kv(user_kv), _to_torch(candidates))
        return np.asarray(scores.numpy(), np.float32)

    def rank_resident(
        self, history: Ids, candidates: Ids, past: list[Floats], *, use_past: bool
    ) -> tuple[Floats, list[Floats]]:
        """Run `rank`."""
        given = _to_torch(history), _to_torch(candidates), _to_user_kv(past), torch.tensor(use_past)
        scores, made = self.network.rank(*given)
        return np.asarray(scores.numpy(), np.float32), _to_arrays(made)

    def run_monolith(self, history: Ids, candidates: Ids, mask: MaskKind = "target_blind") -> Floats:
        """Run `forward`, which also knows the undirected mask."""
        scores = self.network(_to_torch(history), _to_torch(candidates), mask)
        return np.asarray(scores.numpy(), np.float32)

    def probe_user_keys(self, history: Ids, candidates: Ids, mask: MaskKind) -> list[Floats]:
        """Return the user tokens' keys of every layer of the monolith, `[B, N, H, L, dh]`."""
        _, keys = self.network.run_monolith(_to_torch(history), _to_torch(candidates), mask)
        return [key.numpy() for key in keys]


class OnnxCalls(Calls):
    """The calls of ONNX graphs, a session each by the model's name."""

    def __init__(self, sessions: Mapping[str, ort.InferenceSession]) -> None:
        self.sessions = sessions
        self.feeds: dict[str, Feeds] = {}
        """What each graph was given last."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the exported files, `folder/<model>/model.onnx`."""
        files = {model.name: folder / model.name / ONNX_FILE for model in EXPORTED_MODELS}
        return cls({model: open_session(file) for model, file in files.items()})

    def encode_user(self, history: Ids) -> list[Floats]:
        """Run `user_encoder`; return a view of each layer."""
        stacked = self._run(USER_ENCODER.name, [USER_KEYS.name, USER_VALUES.name], {HISTORY.name: history})
        return [array[:, layer] for array in stacked for layer in range(array.shape[1])]

    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """Run `doc_fusion`."""
        feeds = _name_layers(layer_tensor_name, user_kv) | {CANDIDATES.name: candidates}
        return self._run(DOC_FUSION.name, [SCORES.name], feeds)[0]

    def rank_resident(
        self, history: Ids, candidates: Ids, past: list[Floats], *, use_past: bool
    ) -> tuple[Floats, list[Floats]]:
        """Run `ranker_resident`."""
        feeds = _name_layers(past_tensor_name, past)
        feeds |= {HISTORY.name: history, CANDIDATES.name: candidates, USE_PAST: np.array(use_past)}
        outputs = [SCORES.name, *_name_layers(layer_tensor_name, past)]
        scores, *made = self._run(RANKER_RESIDENT.name, outputs, feeds)
        return scores, made

    def run_monolith(self, history: Ids, candidates: Ids) -> Floats:
        """Run `ranker_full`."""
        return self._run(RANKER_FULL.name, [SCORES.name], {HISTORY.name: history, CANDIDATES.name: candidates})[0]

    def _run(self, model: str, outputs: list[str], feeds: Feeds) -> list[Floats]:
        self.feeds[model] = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        return [np.asarray(array) for array in self.sessions[model].run(outputs, self.feeds[model])]


def _name_layers(name: Callable[[TensorSpec, int], str], user_kv: list[Floats]) -> Feeds:
    """Return M keys and then M values by the names that a graph has for them."""
    layers = len(user_kv) // 2
    names = [name(spec, layer) for spec in (USER_KEYS, USER_VALUES) for layer in range(layers)]
    return dict(zip(names, user_kv, strict=True))


def _to_torch(ids: Ids) -> torch.Tensor:
    return torch.from_numpy(ids.copy())  # an array may be a view in reverse order


def _to_user_kv(layers: list[Floats]) -> UserKV:
    tensors = tuple(torch.from_numpy(layer) for layer in layers)
    return UserKV(tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :])


def _to_arrays(user_kv: UserKV) -> list[Floats]:
    return [layer.numpy() for layer in user_kv.keys + user_kv.values]

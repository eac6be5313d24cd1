"""The interface of a peer: prepare once, then encode a history and fuse candidates, each timed by the caller."""

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Peer(abc.ABC):
    """One way of ranking with a shared user KV, on `threads` threads, fp32."""

    @abc.abstractmethod
    def encode(self, history: Ids) -> Any:
        """Encode INT64 `[L, fields]`, without padding, into user KV of the peer's own kind."""

    @abc.abstractmethod
    def fuse(self, user_kv: Any, candidates: Ids) -> Floats:
        """Score INT64 `[N, T]` against that KV: FP32 `[N]`."""

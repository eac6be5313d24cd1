"""kvcast itself, shared and by full recomputation, without a server: the runtime's own classes on an export."""

from pathlib import Path

import numpy as np

from kvcast.serving import DocFusion, FullRanker, UserEncoder
from kvcast.serving.artefact import SessionOptions
from kvcast.serving.doc_fusion import FusionJob
from kvcast.serving.packing import strip_padding
from kvcast.serving.user_kv import KVArrays
from perf.baselines.interface import Floats, Ids, Peer


class Ours(Peer):
    """Folded queries, sink slot, ONNX Runtime."""

    def __init__(self, repository: Path, threads: int) -> None:
        options = SessionOptions(provider="cpu", threads=threads)
        self._encoder = UserEncoder.open(repository / "user_encoder" / "1", options)
        self._fusion = DocFusion.open(repository / "doc_fusion" / "1", options)

    def encode(self, history: Ids) -> KVArrays:
        """Encode as `user_encoder` does."""
        return self._encoder.encode([strip_padding(history)])[0]

    def fuse(self, user_kv: KVArrays, candidates: Ids) -> Floats:
        """Fuse as `doc_fusion` does."""
        (scores,) = self._fusion.score([FusionJob(user_kv, candidates[None])])  # [1, N]
        return np.asarray(scores[0], np.float32)


class FullRecomputation(Peer):
    """All N full sequences in one batch (`ranker_full` runs in chunks)."""

    def __init__(self, repository: Path, threads: int) -> None:
        options = SessionOptions(provider="cpu", threads=threads)
        self._ranker = FullRanker.open(repository / "ranker_full" / "1", options)

    def encode(self, history: Ids) -> Ids:
        """Nothing is shared, so nothing is encoded."""
        return history

    def fuse(self, user_kv: Ids, candidates: Ids) -> Floats:
        """Run N full forwards at once."""
        return self._ranker.score(user_kv, candidates, chunk=len(candidates))

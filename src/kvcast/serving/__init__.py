"""What works inside a Triton Python-backend process: sessions, packing, checks, the mapping of errors.

One file a served model (`user_encoder`, `doc_fusion`, `resident_ranker`, `full_ranker`) on shared parts. No torch, and
no Triton import: the adapters in `model_repository` hand in what they have, so all of this is tested without a server.
"""

import os

# ONNX Runtime 1.31 reports its use to its makers unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from kvcast.serving.doc_fusion import DocFusion
from kvcast.serving.full_ranker import FullRanker
from kvcast.serving.resident_ranker import ResidentRanker
from kvcast.serving.serve import start_model
from kvcast.serving.user_encoder import UserEncoder

__all__ = ["DocFusion", "FullRanker", "ResidentRanker", "UserEncoder", "start_model"]

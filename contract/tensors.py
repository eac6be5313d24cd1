"""The tensors and the models on the wire, named once.

Axes are those of one user; on the wire every tensor has a leading batch axis (users). The `config.pbtxt` files
are written by hand for people to read, and a test holds them against this module.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """A tensor on the wire. `dtype` is Triton's name; an axis of "1" has exactly that size."""

    name: str
    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A model's name, and the tensors that go in and come out of it, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[str, ...] = ()
    """The models that an ensemble chains; empty for a model that does its own work."""


# Users in one Triton batch; every config.pbtxt repeats it as max_batch_size.
MAX_BATCH_SIZE = 8

HISTORY = TensorSpec("history", "INT64", ("L", "history_fields"))
CANDIDATES = TensorSpec("candidates", "INT64", ("N", "T"))
SCORES = TensorSpec("scores", "FP32", ("N",))
USER_KEYS = TensorSpec("user_keys", "FP32", ("M", "H", "key_rows", "slots"))
USER_VALUES = TensorSpec("user_values", "FP32", ("M", "H", "slots", "value_columns"))
# The release fingerprint, 32 raw bytes of SHA-256: fusion refuses KV that carries another one.
RELEASE = TensorSpec("release", "UINT8", ("32",))
# The manifest as JSON, made only when asked for: how a client learns fields, vocabularies and limits.
MANIFEST = TensorSpec("manifest", "STRING", ("1",))

USER_ENCODER = ModelSpec("user_encoder", (HISTORY,), (USER_KEYS, USER_VALUES, RELEASE, MANIFEST))
DOC_FUSION = ModelSpec("doc_fusion", (USER_KEYS, USER_VALUES, RELEASE, CANDIDATES), (SCORES,))
RANKER = ModelSpec("ranker", (HISTORY, CANDIDATES), (SCORES,), steps=(USER_ENCODER.name, DOC_FUSION.name))
RANKER_FULL = ModelSpec("ranker_full", (HISTORY, CANDIDATES), (SCORES,))
MODELS = (USER_ENCODER, DOC_FUSION, RANKER, RANKER_FULL)
# The largest difference of scores that fp32 rounding may cause between two exact ways of computing them.
SCORE_TOLERANCE = 1e-5
# The models that hold an ONNX file of their own.
EXPORTED_MODELS = tuple(model for model in MODELS if not model.steps)


def layer_tensor_name(spec: TensorSpec, layer: int) -> str:
    """Return the name of one layer of a stacked KV tensor, as the ONNX fusion graph takes it."""
    return f"{spec.name}_{layer}"

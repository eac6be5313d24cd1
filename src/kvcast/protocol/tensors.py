"""The tensors, the models and the request parameters on the wire, named once.

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
# What user KV depends on, 32 raw bytes of SHA-256: fusion refuses KV that carries another one.
KV_ID = TensorSpec("kv_id", "UINT8", ("32",))
# A secret of this server, from its encoder to its fusion: such KV needs no scan for NaN. Callers can
# not ask for it: the gateway refuses that, and who names no outputs gets zeros. KV without it is scanned.
KV_ORIGIN = TensorSpec("kv_origin", "UINT8", ("16",))
KV_SECRET_VARIABLE = "KVCAST_KV_SECRET"  # noqa: S105 the name of an environment variable; its value is hexadecimal
# The manifest as JSON, made only when asked for: how a client learns fields, vocabularies and limits.
MANIFEST = TensorSpec("manifest", "STRING", ("1",))
# How the reply was made, as JSON (protocol/report.py), made only when REPORT_PARAMETER asks for it.
ENCODE_REPORT = TensorSpec("encode_report", "STRING", ("1",))
FUSE_REPORT = TensorSpec("fuse_report", "STRING", ("1",))

# Request parameters, true or absent. One with our prefix that is not listed is refused: it is a typing error.
PARAMETER_PREFIX = "kvcast_"
# Say how the reply was made, in the report tensors. An output that nobody asks for would change default replies.
REPORT_PARAMETER = "kvcast_report"
# To `ranker_resident` with N = 0: encode the history and keep its user KV; score nothing.
PREFETCH_PARAMETER = "kvcast_prefetch"
# From the gateway alone: the id of a request that is logged. Each model that runs it writes a line of its own.
LOG_PARAMETER = "kvcast_log"
FLAGS = (REPORT_PARAMETER, PREFETCH_PARAMETER)

USER_ENCODER = ModelSpec(
    "user_encoder", (HISTORY,), (USER_KEYS, USER_VALUES, KV_ID, KV_ORIGIN, MANIFEST, ENCODE_REPORT)
)
DOC_FUSION = ModelSpec("doc_fusion", (USER_KEYS, USER_VALUES, KV_ID, CANDIDATES, KV_ORIGIN), (SCORES, FUSE_REPORT))
RANKER = ModelSpec(
    "ranker",
    (HISTORY, CANDIDATES),
    (SCORES, ENCODE_REPORT, FUSE_REPORT),
    steps=(USER_ENCODER.name, DOC_FUSION.name),
)
RANKER_RESIDENT = ModelSpec("ranker_resident", (HISTORY, CANDIDATES), (SCORES, ENCODE_REPORT, FUSE_REPORT, MANIFEST))
RANKER_FULL = ModelSpec("ranker_full", (HISTORY, CANDIDATES), (SCORES,))
MODELS = (USER_ENCODER, DOC_FUSION, RANKER, RANKER_RESIDENT, RANKER_FULL)
# An input of `ranker_resident`'s graph, BOOL: fuse with the KV that was kept, instead of encoding the history.
USE_PAST = "use_past"
# The largest difference of scores that fp32 rounding may cause between two exact ways of computing them.
SCORE_TOLERANCE = 1e-5
# The models that hold an ONNX file of their own.
EXPORTED_MODELS = tuple(model for model in MODELS if not model.steps)


def layer_tensor_name(spec: TensorSpec, layer: int) -> str:
    """Return the name of one layer of user KV in the ONNX graphs that take or give it layer by layer."""
    return f"{spec.name}_{layer}"


def past_tensor_name(spec: TensorSpec, layer: int) -> str:
    """Return the name of one layer of user KV that `ranker_resident`'s graph is given back from an earlier run."""
    return f"past_{layer_tensor_name(spec, layer)}"

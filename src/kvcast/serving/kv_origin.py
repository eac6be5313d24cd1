"""The proof that user KV comes from the encoder of this very server: a secret that the launcher gives to both models.

A tritonserver that was started without the launcher has none; its fusion scans all KV. The proof saves a pass over the
KV and protects nothing else: scores are checked for finiteness in any case.
"""

import hmac
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcast.protocol.tensors import KV_ORIGIN, KV_SECRET_VARIABLE, MANIFEST

SECRET_BYTES = int(KV_ORIGIN.axes[0])


def read_secret() -> bytes:
    """Return the server's secret, empty without one."""
    secret = bytes.fromhex(os.environ.get(KV_SECRET_VARIABLE, ""))
    return secret if len(secret) == SECRET_BYTES else b""


def make_kv_origin(users: int, wanted: Collection[str]) -> npt.NDArray[np.uint8]:
    """Return `kv_origin` UINT8 `[users, 16]`: the secret for the ensemble, zeros for a caller who names no outputs.

    Such a caller gets all outputs, the manifest too, which the ensemble never asks for.
    """
    secret = b"" if MANIFEST.name in wanted else read_secret()
    row = np.frombuffer(secret or bytes(SECRET_BYTES), np.uint8)
    return np.tile(row, (users, 1))


def is_own_kv(origin: npt.NDArray[Any] | None) -> bool:
    """Whether every row of `kv_origin` UINT8 `[users, 16]` is the secret."""
    secret = read_secret()
    return bool(secret) and origin is not None and all(hmac.compare_digest(bytes(row), secret) for row in origin)

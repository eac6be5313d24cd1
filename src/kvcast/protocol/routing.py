"""The routing key of a user, for proxies before several servers.

Each server caches the users that it has encoded, so a user's requests should reach the same one. The key is a hash:
proxies log headers, which must hold neither a user's id nor a history. It is no secret: all ids can be hashed.
"""

import hashlib

import numpy as np
import numpy.typing as npt

# In HTTP and in gRPC metadata, whose keys are in lower case.
ROUTING_HEADER = "x-kvcast-user"
KEY_BYTES = 16


def hash_user(user_id: str | int) -> str:
    """Return the routing key of a user: 32 hexadecimal digits, the same in every process and version."""
    return _hash(b"user", str(user_id).encode(errors="surrogatepass"))


def hash_history(history: npt.NDArray[np.int64]) -> str | None:
    """Return the routing key of a history INT64 `[..., L, history_fields]`; None without events: new users spread."""
    return _hash(b"history", np.ascontiguousarray(history).tobytes()) if history.size else None


def _hash(kind: bytes, data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=kind).hexdigest()

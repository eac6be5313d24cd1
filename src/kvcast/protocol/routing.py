"""Where a user's requests go when there are several servers: the header that a proxy hashes, and what stands in it.

Each server keeps the users that it has encoded, so a user should come back to the same one. The key is a hash: proxies
log headers, and neither a user's id nor a history belongs there. It is no secret: who knows all ids can hash them too.
"""

import hashlib

import numpy as np
import numpy.typing as npt

# Of HTTP, and a key of gRPC's metadata, which is in lower case.
ROUTING_HEADER = "x-kvcast-user"
KEY_BYTES = 16


def hash_user(user_id: str | int) -> str:
    """Return the routing key of a user: 32 hexadecimal digits, the same in every process and for ever."""
    return _hash(b"user", str(user_id).encode(errors="surrogatepass"))


def hash_history(history: npt.NDArray[np.int64]) -> str | None:
    """Return the routing key of a user of whom only the history is known; None without events: new users spread.

    Args:
        history: INT64 `[..., L, history_fields]`.
    """
    return _hash(b"history", np.ascontiguousarray(history).tobytes()) if history.size else None


def _hash(kind: bytes, data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=KEY_BYTES, person=kind).hexdigest()

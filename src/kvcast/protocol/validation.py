"""Checks of a request: by the client before sending, by the models on arrival, with the same words.

A check returns the tensor in its contract dtype, or raises InvalidRequestError with a message that names the tensor,
what was expected and what came.
"""

import functools

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.schema import Field, KVLayout, Limits
from kvcast.protocol.tensors import CANDIDATES, HISTORY, KV_ID, USER_KEYS, USER_VALUES

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def check_history(array: npt.NDArray[np.generic], fields: tuple[Field, ...], limits: Limits) -> Ids:
    """Check integers `[B, L, history_fields]`; L = 0 is a user without history, and valid.

    Raises:
        InvalidRequestError: the rank, the dtype, the number of fields, L or an id is not as expected.
    """
    ids = _check_shape(HISTORY.name, array, fields, "event")
    if ids.shape[1] > limits.history:
        raise InvalidRequestError(
            f"{HISTORY.name}: expected at most L = {limits.history} events, got {ids.shape[1]}: send the newest "
            "(truncate=True of the client)"
        )
    _check_vocabularies(HISTORY.name, ids, fields, "event")
    return ids


def check_candidates(array: npt.NDArray[np.generic], fields: tuple[Field, ...], limits: Limits) -> Ids:
    """Check integers `[B, N, T]`, the target token's field first; N is at least 1.

    Raises:
        InvalidRequestError: the rank, the dtype, the number of fields, N (0 included) or an id is not as
            expected.
    """
    ids = _check_shape(CANDIDATES.name, array, fields, "candidate")
    if not 1 <= ids.shape[1] <= limits.candidates:
        raise InvalidRequestError(
            f"{CANDIDATES.name}: expected N = 1 to {limits.candidates} candidates, got {ids.shape[1]}"
        )
    _check_vocabularies(CANDIDATES.name, ids, fields, "candidate")
    return ids


def check_no_candidates(
    array: npt.NDArray[np.generic],
    fields: tuple[Field, ...],
    limits: Limits,  # noqa: ARG001 the signature of `check_candidates`
) -> Ids:
    """Check the candidates of a prefetch, `[B, 0, T]`.

    Raises:
        InvalidRequestError: it is anything else.
    """
    ids = _check_shape(CANDIDATES.name, array, fields, "candidate")
    if ids.shape[1]:
        raise InvalidRequestError(f"{CANDIDATES.name}: expected N = 0 candidates for a prefetch, got {ids.shape[1]}")
    return ids


def check_same_users(first: str, users: int, second: str, other_users: int) -> None:
    """Check that two tensors of a request have the same number of users on their batch axis.

    Raises:
        InvalidRequestError: they have not.
    """
    if users != other_users:
        raise InvalidRequestError(
            f"{second}: expected {users} users on the batch axis, as {first} has, got {other_users}"
        )


def check_user_kv(keys: Floats, values: Floats, layout: KVLayout, limits: Limits, *, is_own: bool = False) -> None:
    """Check the user KV of a batch, `[B, M, H, key_rows, slots]` and `[B, M, H, slots, value_columns]`.

    is_own: this server's encoder made it; its elements are not scanned.

    Raises:
        InvalidRequestError: a shape is not the layout's, the two disagree, or an element is not finite.
    """
    slots = keys.shape[-1] if keys.ndim == 5 else 0
    history_length = slots - layout.lead_slots
    if not 0 <= history_length <= limits.history:
        raise InvalidRequestError(
            f"{USER_KEYS.name}: expected shape [B, {layout.layers}, {layout.heads}, {layout.key_rows}, slots] with "
            f"{layout.lead_slots} to {layout.slots(limits.history)} slots, got {list(keys.shape)}"
        )
    users = keys.shape[0]
    if users == 0:
        raise InvalidRequestError(f"{USER_KEYS.name}: expected at least 1 user on the batch axis, got 0")
    for name, array, shape in (
        (USER_KEYS.name, keys, layout.keys_shape(history_length)),
        (USER_VALUES.name, values, layout.values_shape(history_length)),
    ):
        if array.shape != (users, *shape):
            raise InvalidRequestError(
                f"{name}: expected shape {[users, *shape]} (layers, heads and slots of this release and of "
                f"the other KV tensor), got {list(array.shape)}"
            )
        if not is_own:
            check_finite(name, array)


def check_kv_id(array: npt.NDArray[np.generic], users: int, kv_id: str) -> None:
    """Check the ids UINT8 `[B, 32]` that came with user KV against this model's own (hex).

    Raises:
        InvalidRequestError: a user's KV carries another id.
    """
    expected = np.frombuffer(bytes.fromhex(kv_id), np.uint8)
    if array.shape != (users, expected.size):
        raise InvalidRequestError(f"{KV_ID.name}: expected shape {[users, expected.size]}, got {list(array.shape)}")
    for row in array:
        if not np.array_equal(row, expected):
            raise InvalidRequestError(
                f"{KV_ID.name}: expected user KV of kv_id {kv_id[:12]}…, got {bytes(row).hex()[:12]}…: "
                "encode the history again with the release that fuses it"
            )


def check_finite(name: str, array: Floats) -> None:
    """Check that no element is NaN or infinite.

    Raises:
        InvalidRequestError: an element is not finite; the message says where.
    """
    finite = np.isfinite(array)
    if not finite.all():
        place = [int(index) for index in np.argwhere(~finite)[0]]
        raise InvalidRequestError(f"{name}: expected finite numbers, got {array[tuple(place)]} at {place}")


def _check_shape(name: str, array: npt.NDArray[np.generic], fields: tuple[Field, ...], row: str) -> Ids:
    """Check rank, number of fields and dtype."""
    if array.ndim != 3:
        raise InvalidRequestError(f"{name}: expected rank 3 [users, {row}s, fields], got shape {list(array.shape)}")
    if array.shape[0] == 0:
        raise InvalidRequestError(f"{name}: expected at least 1 user on the batch axis, got 0")
    if array.shape[2] != len(fields):
        names = ", ".join(field.name for field in fields)
        raise InvalidRequestError(f"{name}: expected {len(fields)} fields ({names}) per {row}, got {array.shape[2]}")
    if array.dtype == np.int64:
        return array  # type: ignore[return-value]  # it is one
    # An empty list has no dtype of its own: numpy calls it float.
    if array.size and not (np.issubdtype(array.dtype, np.integer) and np.can_cast(array.dtype, np.int64)):
        raise InvalidRequestError(f"{name}: expected dtype INT64, got {array.dtype}")
    return array.astype(np.int64, copy=False)


@functools.cache
def _list_sizes(fields: tuple[Field, ...]) -> npt.NDArray[np.uint64]:
    return np.array([field.vocab_size for field in fields], np.uint64)


def _check_vocabularies(name: str, ids: Ids, fields: tuple[Field, ...], row: str) -> None:
    if not ids.size:
        return
    # One unsigned comparison a tensor on the usual path: a negative id is a huge unsigned one.
    outside = ids.view(np.uint64) >= _list_sizes(fields)
    if outside.any():
        user, index, column = (int(place) for place in np.argwhere(outside)[0])
        raise InvalidRequestError(
            f"{name}: expected field {fields[column].name!r} within 0..{fields[column].vocab_size - 1}, "
            f"got {ids[user, index, column]} at {row} {index}" + (f" of user {user}" if len(ids) > 1 else "")
        )

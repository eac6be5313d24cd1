"""User KV of several users as arrays: taking one user out, putting several into one padded rectangle."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcast.protocol.schema import KVLayout

Floats = npt.NDArray[np.float32]


class KVArrays(NamedTuple):
    """KV of a batch of users: keys FP32 `[B, M, H, key_rows, slots]`, values `[B, M, H, slots, value_columns]`.

    Or one layer of it, without the axis M.
    """

    keys: Floats
    values: Floats

    @property
    def users(self) -> int:
        """B."""
        return len(self.keys)

    @property
    def slots(self) -> int:
        """Slots of every user, padding included."""
        return int(self.values.shape[-2])

    def take(self, user: int, slots: int) -> "KVArrays":
        """Return a view of the first `slots` slots of one user, still with a batch axis."""
        return KVArrays(self.keys[user : user + 1, ..., :slots], self.values[user : user + 1, ..., :slots, :])

    def copy_into(self, space: "KVArrays | None") -> "KVArrays":
        """Return a copy, in `space` if it is given: it does not hold on to the run that made this."""
        if space is None:
            return KVArrays(self.keys.copy(), self.values.copy())
        space.keys[...] = self.keys
        space.values[...] = self.values
        return space


def stack_user_kv(parts: Sequence[KVArrays], layout: KVLayout) -> KVArrays:
    """Put KV of different slots into one batch, padding slots after the shorter ones.

    A single part comes back as it is, not copied.
    """
    if len(parts) == 1:
        return parts[0]
    users = sum(part.users for part in parts)
    slots = max(part.slots for part in parts)
    keys = np.zeros((users, *parts[0].keys.shape[1:-1], slots), np.float32)
    values = np.zeros((users, *parts[0].values.shape[1:-2], slots, layout.value_columns), np.float32)
    first = 0
    for part in parts:
        rows = slice(first, first + part.users)
        keys[rows, ..., : part.slots] = part.keys
        keys[rows, ..., layout.mask_row, part.slots :] = layout.mask_value
        values[rows, ..., : part.slots, :] = part.values
        first += part.users
    return KVArrays(keys, values)

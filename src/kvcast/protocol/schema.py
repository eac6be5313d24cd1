"""What a request is made of: feature fields with vocabularies, limits, and the layout of user KV.

These small frozen records are shared by the TOML configuration, the manifest and the validation. msgspec checks their
types where they are read from a file; they hold no tensors.
"""

import msgspec

from kvcast.protocol.decoding import Count


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A categorical feature. Ids run from 0 to `vocab_size - 1`; id 0 means padding or unknown."""

    name: str
    vocab_size: int


class FeatureSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a history event and of a candidate, in column order.

    A name that occurs on both sides (`item`) is one vocabulary with one embedding table. The first candidate
    field is the target token, from which the score is read.
    """

    history_fields: tuple[Field, ...]
    candidate_fields: tuple[Field, ...]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest request that is served: events of a history, candidates of one user."""

    history: Count
    candidates: Count


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request that a configuration is meant for: shapes that warm-up, examples and load tests use."""

    history: Count
    candidates: Count


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How per-layer user KV is laid out, so that fusion can read it without moving it.

    `user_keys` is `[layers, heads, key_rows, slots]` (keys transposed: a slot is a column) and `user_values`
    is `[layers, heads, slots, value_columns]` (a slot is a row), with `slots = lead_slots + L`. The first
    `lead_slots` slots belong to no event; slot `lead_slots + i` belongs to event i. Padding is a slot of zeros
    whose `user_keys[:, :, mask_row, slot]` is `mask_value`: where users share a run, the runtime adds such slots
    after the shorter ones, and they must change no score.
    """

    layers: int
    heads: int
    key_rows: int
    value_columns: int
    lead_slots: int
    mask_row: int
    mask_value: float

    def slots(self, history_length: int) -> int:
        """Return the slots that a history of `history_length` events takes."""
        return self.lead_slots + history_length

    def keys_shape(self, history_length: int) -> tuple[int, int, int, int]:
        """Return the shape of one user's `user_keys`."""
        return (self.layers, self.heads, self.key_rows, self.slots(history_length))

    def values_shape(self, history_length: int) -> tuple[int, int, int, int]:
        """Return the shape of one user's `user_values`."""
        return (self.layers, self.heads, self.slots(history_length), self.value_columns)

    def bytes_of(self, history_length: int, itemsize: int = 4) -> int:
        """Return the bytes of one user's keys and values together, `itemsize` bytes an element."""
        row = self.key_rows + self.value_columns
        return self.layers * self.heads * self.slots(history_length) * row * itemsize

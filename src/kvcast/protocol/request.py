"""A ranking request, and its JSON: events and candidates as objects with named fields.

    {"history": [{"item": 812, "action": 2}, …], "candidates": [{"item": 31, "category": 4, …}, …]}

Names are matched with the served schema, so neither column order nor a missing field can go wrong silently.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from kvcast.protocol.decoding import Id, decode_json
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.schema import FeatureSchema, Field

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankRequest:
    """A user's history INT64 `[L, history_fields]`, oldest event first, and candidates INT64 `[N, T]`."""

    history: Ids
    candidates: Ids

    @classmethod
    def from_json(cls, text: str, schema: FeatureSchema) -> Self:
        """Read a request.

        Raises:
            InvalidRequestError: it is not JSON, or its keys, fields or ids do not match the schema.
        """
        sides = [
            ("history", _define_rows(schema.history_fields)),
            ("candidates", _define_rows(schema.candidate_fields)),
        ]
        kind = msgspec.defstruct("Request", sides, forbid_unknown_fields=True)
        table: Any = decode_json(text, kind, "request", InvalidRequestError)
        return cls(
            _stack(table.history, len(schema.history_fields)), _stack(table.candidates, len(schema.candidate_fields))
        )

    def to_json(self, schema: FeatureSchema) -> str:
        """Return the request as JSON, a line an event or candidate."""
        sides = (
            ("history", self.history, schema.history_fields),
            ("candidates", self.candidates, schema.candidate_fields),
        )
        parts = []
        for name, ids, fields in sides:
            names = [field.name for field in fields]
            rows = [json.dumps(dict(zip(names, row, strict=True))) for row in ids.tolist()]
            parts.append(f'  "{name}": [\n    ' + ",\n    ".join(rows) + "\n  ]")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _define_rows(fields: tuple[Field, ...]) -> GenericAlias:
    """Return the type of a list of objects with one id a field; a field's name need not be a Python name."""
    names = {f"field_{index}": field.name for index, field in enumerate(fields)}
    row = msgspec.defstruct("Row", [(name, Id) for name in names], rename=names, forbid_unknown_fields=True)
    return GenericAlias(list, row)


def _stack(rows: Sequence[msgspec.Struct], width: int) -> Ids:
    return np.array([msgspec.structs.astuple(row) for row in rows], np.int64).reshape(len(rows), width)

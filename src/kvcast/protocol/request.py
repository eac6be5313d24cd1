"""A ranking request, and its JSON: events and candidates as objects with named fields.

    {"history": [{"item": 812, "action": 2}, …], "candidates": [{"item": 31, "category": 4, …}, …]}

Names are matched with the served schema, so neither column order nor a missing field can go wrong silently.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

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
            InvalidRequestError: it is not JSON, or a key, field or id is not as the schema says.
        """
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidRequestError(f"request: expected JSON, got {error}") from error
        if not isinstance(table, dict) or set(table) != {"history", "candidates"}:
            got = sorted(table) if isinstance(table, dict) else type(table).__name__
            raise InvalidRequestError(f"request: expected an object with history and candidates, got {got}")
        return cls(
            history=_read_rows("history", table["history"], schema.history_fields),
            candidates=_read_rows("candidates", table["candidates"], schema.candidate_fields),
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


def _read_rows(side: str, rows: Any, fields: tuple[Field, ...]) -> Ids:
    """Return `[rows, fields]` in the schema's column order."""
    if not isinstance(rows, list):
        raise InvalidRequestError(f"{side}: expected a list, got {type(rows).__name__}")
    names = [field.name for field in fields]
    expected = set(names)
    table = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != expected:
            got = sorted(row) if isinstance(row, dict) else repr(row)
            raise InvalidRequestError(f"{side}[{index}]: expected an object with {', '.join(names)}, got {got}")
        table.append([_read_id(f"{side}[{index}].{name}", row[name]) for name in names])
    return np.array(table, np.int64).reshape(len(table), len(names))


def _read_id(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 63:
        raise InvalidRequestError(f"{where}: expected an id (a whole number), got {value!r}")
    return value

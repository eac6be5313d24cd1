"""How a reply was made: what the two report tensors say, as JSON, a string a user.

It knows the words; it does not know who measures or who asks.
"""

import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import Any, Self

from kvcast.protocol.errors import ServerFaultError


class CacheResult(enum.StrEnum):
    """Where the user's KV came from: kept from before, encoded for this request, or there is no cache."""

    HIT = "hit"
    MISS = "miss"
    OFF = "off"


@dataclass(frozen=True)
class Report:
    """How one user's scores were made.

    encode_seconds: the run that encoded the history, 0 on a hit. A cold `ranker_resident` scores the candidates in
    that same run. fuse_seconds: the run that only scored, 0 where there was none. A run may have served several users.
    """

    cache: CacheResult
    encode_seconds: float = 0.0
    fuse_seconds: float = 0.0

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def merge(cls, *parts: str) -> Self:
        """Build a report from the JSON of its parts (encoding, fusing), later ones over earlier ones.

        Raises:
            ServerFaultError: a part is not one.
        """
        try:
            table: dict[str, Any] = {}
            for part in parts:
                table |= json.loads(part)
            return cls(**{**table, "cache": CacheResult(table["cache"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ServerFaultError(f"report: not one of kvcast ({type(error).__name__}: {error})") from error

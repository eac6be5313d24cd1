"""What the launcher tells the guard, in a file of JSON that is replaced as a whole."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class State:
    """The server as its launcher sees it.

    reason: why it is not ready. broken: models with a dead process. deaths: processes that have died, by model.
    repairs: times that they were replaced; restarts: those of which tritonserver itself had crashed.
    release: number and fingerprint of the release that is served. refused_release: the number of one that was to be
    served and failed its checks; refused_reason: how.
    """

    is_ready: bool = False
    reason: str = "the server is starting"
    is_draining: bool = False
    broken: tuple[str, ...] = ()
    deaths: dict[str, int] = field(default_factory=dict)
    repairs: int = 0
    restarts: int = 0
    release: int = 0
    fingerprint: str = ""
    refused_release: int = 0
    refused_reason: str = ""

    def write(self, path: Path) -> None:
        """Replace the file."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(self)) + "\n")
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "State":
        """Read the file; a server that has said nothing yet is starting."""
        try:
            table: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        return cls(**{**table, "broken": tuple(table["broken"])})

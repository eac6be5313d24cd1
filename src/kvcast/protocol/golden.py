"""The golden request of a release: one request and the scores of the trained network, stored beside each artefact.

It is sent to a release before any traffic is: other hardware, another ONNX Runtime or a wrong file then shows before a
caller sees a wrong score.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from kvcast.protocol.decoding import Id, decode_json, read_file
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.tensors import SCORE_TOLERANCE, SCORES

GOLDEN_FILE = "golden.json"


def measure_differences(
    expected: npt.NDArray[Any], got: npt.NDArray[Any], size: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float64]:
    """Return the differences: absolute, relative above 1; NaN or infinite where a number is.

    size: what a difference is relative to, broadcast to the numbers; by default the expected ones.
    """
    with np.errstate(invalid="ignore"):
        difference = np.abs(got.astype(np.float64) - expected)
    relative: npt.NDArray[np.float64] = difference / np.maximum(1, np.abs(expected) if size is None else size)
    return relative


class _Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    history: list[list[Id]]
    candidates: list[list[Id]]
    scores: list[float]


@dataclass(frozen=True)
class Golden:
    """History INT64 `[L, history_fields]`, candidates INT64 `[N, T]`, and the right scores FP32 `[N]`."""

    history: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def check(self, scores: npt.NDArray[Any]) -> None:
        """Check that a served release gives these scores, within `SCORE_TOLERANCE` (relative above 1).

        Raises:
            ArtefactError: they are not those recorded at export, within `SCORE_TOLERANCE` (relative above 1).
        """
        if scores.shape != self.scores.shape:
            raise ArtefactError(
                f"golden request: expected {SCORES.name} of shape {list(self.scores.shape)}, got {list(scores.shape)}"
            )
        difference = measure_differences(self.scores, scores).max()
        if not difference <= SCORE_TOLERANCE:  # so that NaN is refused too
            raise ArtefactError(
                f"golden request: expected the {SCORES.name} recorded at export within {SCORE_TOLERANCE:g}, "
                f"got a difference of {difference:.3g}: this server does not compute what was proved"
            )

    def agrees_with(self, other: Self) -> bool:
        """Whether another export recorded the same scores, within `SCORE_TOLERANCE`."""
        return self.scores.shape == other.scores.shape and bool(
            measure_differences(self.scores, other.scores).max() <= SCORE_TOLERANCE
        )

    def to_json(self) -> str:
        """Return the request and its scores as JSON."""
        return json.dumps({name: array.tolist() for name, array in vars(self).items()}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ArtefactError: it is something else.
        """
        table = decode_json(text, _Golden, GOLDEN_FILE, ArtefactError)
        with contextlib.suppress(ValueError):  # rows of different lengths
            history, candidates = np.array(table.history, np.int64), np.array(table.candidates, np.int64)
            if history.ndim == candidates.ndim == 2 and table.scores:
                return cls(history, candidates, np.array(table.scores, np.float32))
        raise ArtefactError(f"{GOLDEN_FILE}: expected history [L, fields], candidates [N, T] and scores [N]")


def read_golden(folder: Path) -> Golden:
    """Read the golden request beside an artefact; raises ArtefactError if there is none that can be used."""
    return Golden.from_json(read_file(folder / GOLDEN_FILE, "export again", ArtefactError))

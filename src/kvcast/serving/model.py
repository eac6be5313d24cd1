"""What every served model is: a request checked into a job, jobs planned into groups, groups run."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.tensors import ModelSpec
from kvcast.serving.artefact import Artefact, SessionOptions, open_artefact
from kvcast.serving.metrics import Stopwatch
from kvcast.serving.options import CACHE_OFF, CacheOptions
from kvcast.serving.user_kv_cache import UserKVCache

Tensors = dict[str, npt.NDArray[Any]]
Job = TypeVar("Job")


class Request(NamedTuple):
    """A request as read: inputs by name, the names of the outputs that are wanted, and its parameters."""

    tensors: Tensors
    wanted: Sequence[str]
    parameters: Mapping[str, Any] = {}

    def asks_for(self, parameter: str) -> bool:
        """Whether a parameter of ours is set.

        Raises:
            InvalidRequestError: it is neither true nor false.
        """
        value = self.parameters.get(parameter, False)
        if not isinstance(value, bool):
            raise InvalidRequestError(f"parameter {parameter}: expected true or false, got {value!r}")
        return value


class ServedModel(abc.ABC, Generic[Job]):
    """A model as the server sees it: tensors in, tensors out, in three steps."""

    spec: ModelSpec
    artefact: Artefact
    cache: UserKVCache | None = None
    """The users that are cached; None for a model that keeps none."""

    def __init__(self, artefact: Artefact, cache: CacheOptions = CACHE_OFF) -> None:  # noqa: ARG002 for those that cache
        self.artefact = artefact
        self.stopwatch = Stopwatch()

    @classmethod
    def open(cls, folder: Path, options: SessionOptions, cache: CacheOptions = CACHE_OFF) -> Self:
        """Open the exported artefact in `folder`.

        Raises:
            ArtefactError: it is missing, damaged or not this model's.
        """
        return cls(open_artefact(folder, cls.spec.name, options), cache)

    @abc.abstractmethod
    def check(self, request: Request) -> Job:
        """Turn one request into a job.

        Raises:
            InvalidRequestError: a tensor or parameter is not what the contract says.
        """

    @abc.abstractmethod
    def plan(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Group jobs that are waiting together, by their places: each group is run and answered before the next.

        What pays to run together belongs together; what is quick comes first.
        """

    @abc.abstractmethod
    def run(self, jobs: Sequence[Job]) -> list[Tensors]:
        """Run the checked jobs of one group; return the outputs of each, in order."""

    @abc.abstractmethod
    def make_warm_up(self) -> Tensors:
        """Return the inputs of a valid request of the expected workload's size."""


def write_strings(texts: Iterable[str]) -> npt.NDArray[np.object_]:
    """Return a STRING tensor `[users, 1]`."""
    return np.array([[text.encode()] for text in texts], np.object_)

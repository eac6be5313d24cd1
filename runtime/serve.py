"""From a list of Triton requests to their replies: read, check, run what is valid together, map every error.

Triton's `pb_utils` comes in as an argument, so nothing here imports Triton. The rule that this module keeps: each
request gets exactly one reply, as soon as it is there; a bad request spoils no other; no traceback reaches a caller.
"""

import abc
import functools
import json
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvcast.contract.errors import ErrorKind, InvalidRequestError, KvcastError, ServerFaultError
from kvcast.contract.tensors import PARAMETER_PREFIX, PARAMETERS, ModelSpec
from kvcast.runtime.artefact import Artefact, SessionOptions, open_artefact
from kvcast.runtime.metrics import Metrics, Stopwatch
from kvcast.runtime.options import CACHE_OFF, CacheOptions, read_options
from kvcast.runtime.user_kv_cache import UserKVCache

Tensors = dict[str, npt.NDArray[Any]]
Job = TypeVar("Job")
Log = Callable[[str], None]

# The first run allocates, the second lets ONNX Runtime plan by what the first needed, the third is the usual one.
WARM_UP_REQUESTS = 3


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
    """The users that are kept; None for a model that keeps none."""

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

    def warm_up(self, log_error: Log) -> None:
        """Answer the warm-up request, more than once, so that no caller pays for first allocations; forget it then.

        Raises:
            KvcastError: it is not answered; the model cannot serve.
        """
        wanted = [tensor.name for tensor in self.spec.outputs]
        for _ in range(WARM_UP_REQUESTS):
            ((_, reply),) = answer(self, [lambda: Request(self.make_warm_up(), wanted)], log_error)
            if isinstance(reply, KvcastError):
                raise reply
            if self.cache is not None:
                self.cache.forget()
        self.stopwatch = Stopwatch()


class LoadedModel(NamedTuple):
    """What an adapter holds: the model and its metrics."""

    model: ServedModel[Any]
    metrics: Metrics


def load_model(pb_utils: Any, args: dict[str, str], kind: type[ServedModel[Any]]) -> LoadedModel:
    """Open and warm up a model from what Triton hands to `initialize`, and say in the log what it runs on.

    Raises:
        TritonModelException: the artefact cannot be used; the message says why.
    """
    folder = Path(args["model_repository"]) / args["model_version"]
    try:
        options = read_options(json.loads(args["model_config"]))
        model = kind.open(folder, options.session, options.cache)
        model.warm_up(pb_utils.Logger.log_error)
    except KvcastError as error:
        raise pb_utils.TritonModelException(str(error)) from None
    manifest, artefact = model.artefact.manifest, model.artefact
    labels = {"model": manifest.model, "version": args["model_version"], "instance": args["model_instance_name"]}
    metrics = Metrics(pb_utils, labels)
    metrics.publish(model.stopwatch, model.cache)
    pb_utils.Logger.log_info(
        f"{manifest.model}: {manifest.config}, release {manifest.release[:12]}, {artefact.provider}, "
        f"{artefact.threads} threads" + (f", {describe_cache(model)}" if model.cache is not None else "")
    )
    return LoadedModel(model, metrics)


def describe_cache(model: ServedModel[Any]) -> str:
    """Return what the cache can hold, in users of the expected length."""
    if model.cache is None or not model.cache.is_on:
        return "user KV cache off"
    workload = model.artefact.manifest.workload
    users = model.cache.budget_bytes // model.artefact.manifest.user_kv.bytes_of(workload.history)
    return f"user KV cache of {model.cache.budget_bytes / 1e6:.0f} MB (about {users} users of L = {workload.history})"


def serve_requests(pb_utils: Any, requests: Sequence[Any], loaded: LoadedModel) -> None:
    """Answer what Triton hands to `execute`, each request as soon as its reply is there."""
    model, metrics = loaded
    log_error = pb_utils.Logger.log_error

    def read(request: Any) -> Request:
        tensors = {
            spec.name: pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in model.spec.inputs
        }
        return Request(tensors, request.requested_output_names(), read_parameters(request.parameters()))

    for index, reply in answer(model, [functools.partial(read, request) for request in requests], log_error):
        response, error = _make_response(pb_utils, reply, log_error)
        try:
            metrics.publish(model.stopwatch, model.cache, [error] if error else [])
        except Exception as problem:  # noqa: BLE001 an answer is worth more than its count
            hide_unexpected(problem, log_error)
        requests[index].get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def read_parameters(text: str) -> dict[str, Any]:
    """Return a request's parameters from Triton's JSON.

    Raises:
        InvalidRequestError: one has our prefix and is not ours.
    """
    parameters: dict[str, Any] = json.loads(text) if text else {}
    unknown = [name for name in parameters if name.startswith(PARAMETER_PREFIX) and name not in PARAMETERS]
    if unknown:
        raise InvalidRequestError(f"parameter {unknown[0]}: expected one of {', '.join(PARAMETERS)}")
    return parameters


def answer(
    model: ServedModel[Job], requests: Sequence[Callable[[], Request]], log_error: Log
) -> Iterator[tuple[int, Tensors | KvcastError]]:
    """Answer requests: for each, once, its place and its outputs by name, or its error; whichever is there first.

    Args:
        model: who answers.
        requests: functions that read one request each, as reading can fail too.
        log_error: receives what callers must not see.
    """
    jobs: dict[int, Job] = {}
    for index, read in enumerate(requests):
        try:
            jobs[index] = model.check(read())
        except Exception as error:  # noqa: BLE001 whatever it is, only this request fails
            yield index, hide_unexpected(error, log_error)
    places = list(jobs)
    for group in _plan(model, list(jobs.values()), log_error):
        own = [places[index] for index in group]
        yield from zip(own, _run_group(model, [jobs[place] for place in own], log_error), strict=True)


def _plan(model: ServedModel[Job], jobs: list[Job], log_error: Log) -> list[list[int]]:
    """Return the model's plan, or each job alone if that fails or leaves one out."""
    if len(jobs) < 2:
        return [[index] for index in range(len(jobs))]
    each_alone = [[index] for index in range(len(jobs))]
    try:
        groups = model.plan(jobs)
    except Exception as error:  # noqa: BLE001 a plan saves time, no more
        hide_unexpected(error, log_error)
        return each_alone
    is_whole = sorted(index for group in groups for index in group) == list(range(len(jobs)))
    return [group for group in groups if group] if is_whole else each_alone


def write_strings(texts: Iterable[str]) -> npt.NDArray[np.object_]:
    """Return a STRING tensor `[users, 1]`."""
    return np.array([[text.encode()] for text in texts], np.object_)


def hide_unexpected(error: Exception, log_error: Log) -> KvcastError:
    """Return an error fit for a caller: our own as it is, any other as a reference to the server's log."""
    if isinstance(error, KvcastError):
        return error
    reference = uuid.uuid4().hex[:12]
    log_error(f"unexpected error {reference}:\n" + "".join(traceback.format_exception(error)))
    return ServerFaultError(f"unexpected error on the server; its log has the details under {reference}")


def _run_group(model: ServedModel[Job], jobs: list[Job], log_error: Log) -> Sequence[Tensors | KvcastError]:
    """Run the jobs together; if that fails, each alone, so that the one at fault fails alone."""
    try:
        return _check_count(model.run(jobs), len(jobs))
    except Exception as error:  # noqa: BLE001 reported to the caller and the log
        if len(jobs) == 1:
            return [hide_unexpected(error, log_error)]
    return [_run_group(model, [job], log_error)[0] for job in jobs]


def _check_count(outputs: list[Tensors], count: int) -> list[Tensors]:
    if len(outputs) != count:
        raise RuntimeError(f"{count} jobs got {len(outputs)} outputs")
    return outputs


def _make_response(pb_utils: Any, reply: Tensors | KvcastError, log_error: Log) -> tuple[Any, KvcastError | None]:
    """Return the response, and the error that it carries."""
    if not isinstance(reply, KvcastError):
        try:
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in reply.items()]
            return pb_utils.InferenceResponse(output_tensors=tensors), None
        except Exception as error:  # noqa: BLE001 shared memory can be full; only this request fails
            reply = hide_unexpected(error, log_error)
    return pb_utils.InferenceResponse(error=make_triton_error(pb_utils, str(reply), reply.kind)), reply


def make_triton_error(pb_utils: Any, message: str, kind: ErrorKind) -> Any:
    """Return the `TritonError` that spells an error of this kind."""
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, kind.triton_code))

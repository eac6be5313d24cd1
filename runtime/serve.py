"""From a list of Triton requests to a list of replies: read, check, run what is valid together, map every error.

Triton's `pb_utils` comes in as an argument, so nothing here imports Triton. The rule that this module keeps: each
request gets exactly one reply, in order; a bad request spoils no other; no traceback reaches a caller.
"""

import abc
import functools
import json
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvcast.contract.errors import ErrorKind, KvcastError, ServerFaultError
from kvcast.contract.tensors import ModelSpec
from kvcast.runtime.artefact import Artefact, SessionOptions, open_artefact

Tensors = dict[str, npt.NDArray[Any]]
# A request as read: inputs by name, and the names of the outputs that are wanted.
Request = tuple[Tensors, Sequence[str]]
Job = TypeVar("Job")
Model = TypeVar("Model", bound="ServedModel[Any]")
Log = Callable[[str], None]

# The first run allocates, the second lets ONNX Runtime plan by what the first needed, the third is the usual one.
WARM_UP_REQUESTS = 3


class ServedModel(abc.ABC, Generic[Job]):
    """A model as the server sees it: tensors in, tensors out, in two steps."""

    spec: ModelSpec
    artefact: Artefact

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact

    @classmethod
    def open(cls, folder: Path, options: SessionOptions) -> Self:
        """Open the exported artefact in `folder`.

        Raises:
            ArtefactError: it is missing, damaged or not this model's.
        """
        return cls(open_artefact(folder, cls.spec.name, options))

    @abc.abstractmethod
    def check(self, tensors: Tensors, wanted: Sequence[str]) -> Job:
        """Turn the tensors of one request into a job.

        Args:
            tensors: the model's inputs by name.
            wanted: names of the outputs that the caller asks for.

        Raises:
            InvalidRequestError: a tensor is not what the contract says.
        """

    @abc.abstractmethod
    def run(self, jobs: Sequence[Job]) -> list[Tensors]:
        """Run checked jobs, as many at a time as pays; return the outputs of each, in order."""

    @abc.abstractmethod
    def make_warm_up(self) -> Tensors:
        """Return the inputs of a valid request of the expected workload's size."""

    def warm_up(self, log_error: Log) -> None:
        """Answer the warm-up request, more than once, so that no caller pays for first allocations.

        Raises:
            KvcastError: it is not answered; the model cannot serve.
        """
        wanted = [tensor.name for tensor in self.spec.outputs]
        for _ in range(WARM_UP_REQUESTS):
            (reply,) = answer(self, [lambda: (self.make_warm_up(), wanted)], log_error)
            if isinstance(reply, KvcastError):
                raise reply


def load_model(pb_utils: Any, args: dict[str, str], model: type[Model]) -> Model:
    """Open and warm up a model from what Triton hands to `initialize`, and say in the log what it runs on.

    Raises:
        TritonModelException: the artefact cannot be used; the message says why.
    """
    config = json.loads(args["model_config"])
    folder = Path(args["model_repository"]) / args["model_version"]
    try:
        opened = model.open(folder, read_options(config))
        opened.warm_up(pb_utils.Logger.log_error)
    except KvcastError as error:
        raise pb_utils.TritonModelException(str(error)) from None
    manifest, artefact = opened.artefact.manifest, opened.artefact
    pb_utils.Logger.log_info(
        f"{manifest.model}: {manifest.config}, release {manifest.release[:12]}, {artefact.provider}, "
        f"{artefact.threads} threads"
    )
    return opened


def read_options(config: dict[str, Any]) -> SessionOptions:
    """Read what an operator set in `config.pbtxt`, as Triton passes it on in JSON."""
    parameters = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
    groups = config.get("instance_group", [])
    try:
        threads = int(parameters.get("intra_op_threads", "0"))
    except ValueError:
        raise ServerFaultError(
            f"parameter intra_op_threads: expected a number, got {parameters['intra_op_threads']!r}"
        ) from None
    return SessionOptions(
        provider=parameters.get("execution_provider", "auto"),
        threads=threads,
        instances=max(1, sum(int(group.get("count", 1)) for group in groups)),
    )


def serve_requests(pb_utils: Any, requests: Sequence[Any], model: ServedModel[Any]) -> list[Any]:
    """Answer what Triton hands to `execute`: one `InferenceResponse` a request, in order."""

    def read(request: Any) -> Request:
        tensors = {
            spec.name: pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in model.spec.inputs
        }
        return tensors, request.requested_output_names()

    log_error = pb_utils.Logger.log_error
    replies = answer(model, [functools.partial(read, request) for request in requests], log_error)
    return [_make_response(pb_utils, reply, log_error) for reply in replies]


def answer(
    model: ServedModel[Job], requests: Sequence[Callable[[], Request]], log_error: Log
) -> list[Tensors | KvcastError]:
    """Answer requests: outputs by name, or the error, for each in order.

    Args:
        model: who answers.
        requests: functions that read one request each, as reading can fail too.
        log_error: receives what callers must not see.
    """
    replies: dict[int, Tensors | KvcastError] = {}
    jobs: dict[int, Job] = {}
    for index, read in enumerate(requests):
        try:
            jobs[index] = model.check(*read())
        except Exception as error:  # noqa: BLE001 whatever it is, only this request fails
            replies[index] = hide_unexpected(error, log_error)
    replies.update(zip(jobs, _run_jobs(model, list(jobs.values()), log_error), strict=True))
    return [replies[index] for index in range(len(requests))]


def hide_unexpected(error: Exception, log_error: Log) -> KvcastError:
    """Return an error fit for a caller: our own as it is, any other as a reference to the server's log."""
    if isinstance(error, KvcastError):
        return error
    reference = uuid.uuid4().hex[:12]
    log_error(f"unexpected error {reference}:\n" + "".join(traceback.format_exception(error)))
    return ServerFaultError(f"unexpected error on the server; its log has the details under {reference}")


def _run_jobs(model: ServedModel[Job], jobs: list[Job], log_error: Log) -> Sequence[Tensors | KvcastError]:
    """Run the jobs together; if that fails, each alone, so that the one at fault fails alone."""
    if not jobs:
        return []
    try:
        return _check_count(model.run(jobs), len(jobs))
    except Exception as error:  # noqa: BLE001 reported to the caller and the log
        if len(jobs) == 1:
            return [hide_unexpected(error, log_error)]
    return [_run_jobs(model, [job], log_error)[0] for job in jobs]


def _check_count(outputs: list[Tensors], count: int) -> list[Tensors]:
    if len(outputs) != count:
        raise RuntimeError(f"{count} jobs got {len(outputs)} outputs")
    return outputs


def _make_response(pb_utils: Any, reply: Tensors | KvcastError, log_error: Log) -> Any:
    if not isinstance(reply, KvcastError):
        try:
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in reply.items()]
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:  # noqa: BLE001 shared memory can be full; only this request fails
            reply = hide_unexpected(error, log_error)
    return pb_utils.InferenceResponse(error=make_triton_error(pb_utils, str(reply), reply.kind))


def make_triton_error(pb_utils: Any, message: str, kind: ErrorKind) -> Any:
    """Return the `TritonError` that spells an error of this kind."""
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, kind.triton_code))

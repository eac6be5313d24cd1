"""A model inside Triton: requests are taken in as they come, and answered by one thread, in the backlog's order.

Triton's `pb_utils` comes in as an argument, so nothing here imports Triton. The rule that this module keeps: each
request gets exactly one reply, as soon as it is there; a bad request spoils no other; no traceback reaches a caller.

Why not Triton's own dynamic batcher: with a queue policy (a deadline, a bound), which it needs, Triton 2.51 does not
wake its batcher for a request that comes while the model is busy, which then waits until the next one comes, or for
half a second. It also answers a batch all at once, so that a cache hit would wait for a miss.
"""

import functools
import json
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcast.protocol.errors import BusyError, InvalidRequestError, KvcastError, tag_message
from kvcast.protocol.golden import read_golden
from kvcast.protocol.tensors import (
    CANDIDATES,
    FLAGS,
    HISTORY,
    LOG_PARAMETER,
    PARAMETER_PREFIX,
    REPORT_PARAMETER,
    SCORES,
)
from kvcast.serving.backlog import Backlog, Log, Reply, answer, hide_unexpected
from kvcast.serving.metrics import Metrics, Stopwatch
from kvcast.serving.model import Request, ServedModel
from kvcast.serving.options import read_options
from kvcast.serving.request_log import take_reports

# The first run allocates, the second lets ONNX Runtime plan by what the first needed, the third is the usual one.
WARM_UP_REQUESTS = 3
MICROSECONDS = 1e6
SHARED_MEMORY = "/dev/shm"  # noqa: S108 where Triton keeps what goes between processes
# A region grows by more than what it needs.
ROOM_TO_GROW = 2
# Metrics are written after the last reply, and at most so much later while others wait.
PUBLISHED_WITHIN_SECONDS = 0.1


class Service:
    """A loaded model with its metrics and its thread: Triton's own thread only hands requests in."""

    def __init__(self, pb_utils: Any, model: ServedModel[Any], metrics: Metrics) -> None:
        """Start the thread.

        Args:
            pb_utils: Triton's module.
            model: runs the requests.
            metrics: written to by the new thread alone.
        """
        self._triton, self.model, self._metrics = pb_utils, model, metrics
        self._log_error: Log = pb_utils.Logger.log_error
        self._backlog: Backlog[Any, Any] = Backlog(model, self._log_error)
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None: no more will come
        # What fits into a region as it is at the start; it grows with larger ones, and never shrinks.
        manifest = model.artefact.manifest
        self._largest_reply = manifest.user_kv.bytes_of(manifest.workload.history)
        self._is_open, self._is_closing = True, False  # the first is the thread's own
        self._published, self._errors = 0.0, list[KvcastError]()
        self._thread = threading.Thread(target=self._work, name=model.spec.name, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Any]) -> None:
        """Take in what Triton hands to `execute`; the replies follow."""
        for request in requests:
            self._arrivals.put(request)

    def is_ready(self) -> bool:
        """Whether a request that came now would be answered: the thread lives, and was not told to end."""
        return not self._is_closing and self._thread.is_alive()

    def close(self) -> None:
        """Answer what has come in, and end the thread."""
        self._is_closing = True
        self._arrivals.put(None)
        self._thread.join()

    def _work(self) -> None:
        while self._is_open or len(self._backlog):
            try:
                self._take_in()
                for request, reply in self._backlog.step():
                    self._reply(request, reply)
            except Exception as problem:  # noqa: BLE001 without this thread no request is answered any more
                hide_unexpected(problem, self._log_error)
        self._publish()

    def _take_in(self) -> None:
        """Take in all that has arrived; wait for a first one if none is queued."""
        while self._is_open and not (self._arrivals.empty() and len(self._backlog)):
            request = self._arrivals.get()
            if request is None:
                self._is_open = False
                return
            error = self._backlog.add(
                request,
                functools.partial(read_request, self._triton, self.model, request),
                seconds=(request.timeout() / MICROSECONDS) or float("inf"),
                is_cancelled=request.is_cancelled,
            )
            if error is not None:
                self._reply(request, error)

    def _reply(self, request: Any, reply: Reply) -> None:
        """Send one reply; count it first, so that metrics read after the last reply include all."""
        if not isinstance(reply, KvcastError) and LOG_PARAMETER in request.parameters():
            try:
                reply = take_reports(self.model.spec.name, read_parameters(request), reply)
            except Exception as problem:  # noqa: BLE001 an answer is worth more than its line in the log
                hide_unexpected(problem, self._log_error)
        response, error = self._make_response(reply)
        self.model.stopwatch.wait.extend(self._backlog.waits)
        self._backlog.waits.clear()
        self._errors += [error] if error else []
        is_last = self._arrivals.empty() and not len(self._backlog)
        if is_last or time.monotonic() - self._published >= PUBLISHED_WITHIN_SECONDS:
            self._publish()
        try:
            request.get_response_sender().send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as problem:  # noqa: BLE001 the replies to others must not be lost
            hide_unexpected(problem, self._log_error)

    def _publish(self) -> None:
        """Write what has been counted; a few writes of 20 µs each."""
        self._published = time.monotonic()
        errors, self._errors = self._errors, []
        try:
            self._metrics.publish(self.model.stopwatch, self.model.cache, len(self._backlog), errors)
        except Exception as problem:  # noqa: BLE001 an answer is worth more than its count
            hide_unexpected(problem, self._log_error)

    def _make_response(self, reply: Reply) -> tuple[Any, KvcastError | None]:
        """Return the response, and the error that it carries."""
        triton = self._triton
        if not isinstance(reply, KvcastError):
            try:
                self._check_room(sum(array.nbytes for array in reply.values()))
                tensors = [triton.Tensor(name, np.ascontiguousarray(array)) for name, array in reply.items()]
                return triton.InferenceResponse(output_tensors=tensors), None
            except Exception as error:  # noqa: BLE001 whatever it is, only this request fails
                reply = hide_unexpected(error, self._log_error)
        return triton.InferenceResponse(error=make_triton_error(triton, reply)), reply

    def _check_room(self, size: int) -> None:
        """Check that a reply fits into shared memory: one that does not can never be answered, not even with an error.

        Triton grows the region and never shrinks it (github.com/triton-inference-server/server/issues/7481).

        Raises:
            BusyError: it is larger than any before, and there is no room to grow.
        """
        if size <= self._largest_reply:
            return
        room = shutil.disk_usage(SHARED_MEMORY).free
        if room < ROOM_TO_GROW * size:
            raise BusyError(
                f"busy: the server's shared memory is full: expected {ROOM_TO_GROW * size / 1e6:.0f} MB free for a "
                f"reply of {size / 1e6:.0f} MB, got {room / 1e6:.0f} MB"
            )
        self._largest_reply = size


def start_model(pb_utils: Any, args: dict[str, str], kind: type[ServedModel[Any]]) -> Service:
    """Open, warm up and start a model from what Triton hands to `initialize`, and say in the log what it runs on.

    Raises:
        TritonModelException: the artefact cannot be used; the message says why.
    """
    # A served repository can be one of links; what is wrong is said of the files themselves.
    folder = (Path(args["model_repository"]) / args["model_version"]).resolve()
    try:
        options = read_options(json.loads(args["model_config"]))
        model = kind.open(folder, options.session, options.cache)
        warm_up(model, pb_utils.Logger.log_error)
        check_golden(model, folder, pb_utils.Logger.log_error)
    except KvcastError as error:
        raise pb_utils.TritonModelException(str(error)) from None
    manifest, artefact = model.artefact.manifest, model.artefact
    labels = {"model": manifest.model, "version": args["model_version"], "instance": args["model_instance_name"]}
    metrics = Metrics(pb_utils, labels)
    metrics.start(model.cache)
    pb_utils.Logger.log_info(
        f"{manifest.model}: {manifest.config}, release {manifest.release[:12]}, {artefact.provider}, "
        f"{artefact.threads} threads" + describe_cache(model)
    )
    return Service(pb_utils, model, metrics)


def warm_up(model: ServedModel[Any], log_error: Log) -> None:
    """Answer the warm-up request, more than once, so that no caller pays for first allocations; forget it then.

    Raises:
        KvcastError: it is not answered; the model cannot serve.
    """
    wanted = [tensor.name for tensor in model.spec.outputs]
    for _ in range(WARM_UP_REQUESTS):
        reply = answer(model, lambda: Request(model.make_warm_up(), wanted), log_error)
        if isinstance(reply, KvcastError):
            raise reply
        if model.cache is not None:
            model.cache.forget()
    model.stopwatch = Stopwatch()


def check_golden(model: ServedModel[Any], folder: Path, log_error: Log) -> None:
    """Ask a model that ranks by itself the golden request of its release; the parts of an ensemble are asked together.

    Raises:
        KvcastError: its scores are not those recorded at export; the model must not serve.
    """
    if [tensor.name for tensor in model.spec.inputs] != [HISTORY.name, CANDIDATES.name]:
        return
    golden = read_golden(folder)
    tensors = {HISTORY.name: golden.history[None], CANDIDATES.name: golden.candidates[None]}
    reply = answer(model, lambda: Request(tensors, [SCORES.name]), log_error)
    if isinstance(reply, KvcastError):
        raise reply
    golden.check(reply[SCORES.name][0])
    if model.cache is not None:
        model.cache.forget()
    model.stopwatch = Stopwatch()


def describe_cache(model: ServedModel[Any]) -> str:
    """Return what the cache can hold, in users of the expected length."""
    if model.cache is None:
        return ""
    if not model.cache.is_on:
        return ", user KV cache off"
    workload = model.artefact.manifest.workload
    users = model.cache.budget_bytes // model.artefact.manifest.user_kv.bytes_of(workload.history)
    return f", user KV cache of {model.cache.budget_bytes / 1e6:.0f} MB (about {users} users of L = {workload.history})"


def read_request(pb_utils: Any, model: ServedModel[Any], request: Any) -> Request:
    """Read one of Triton's requests.

    Raises:
        InvalidRequestError: it has a parameter with our prefix that is not ours, or neither true nor false.
    """
    given = {spec.name: pb_utils.get_input_tensor_by_name(request, spec.name) for spec in model.spec.inputs}
    tensors = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
    parameters = read_parameters(request)
    known = (*FLAGS, LOG_PARAMETER)
    unknown = [name for name in parameters if name.startswith(PARAMETER_PREFIX) and name not in known]
    if unknown:
        raise InvalidRequestError(f"parameter {unknown[0]}: expected one of {', '.join(FLAGS)}")
    read = Request(tensors, request.requested_output_names(), parameters)
    for name in FLAGS:  # also those that this model does not use
        read.asks_for(name)
    if LOG_PARAMETER in parameters:
        read = read._replace(parameters=parameters | {REPORT_PARAMETER: True})
    return read


def read_parameters(request: Any) -> dict[str, Any]:
    """Return the parameters of one of Triton's requests."""
    text = request.parameters()
    return json.loads(text) if text else {}


def make_triton_error(pb_utils: Any, error: KvcastError) -> Any:
    """Return the `TritonError` that spells an error."""
    return pb_utils.TritonError(tag_message(error), getattr(pb_utils.TritonError, error.kind.triton_code))

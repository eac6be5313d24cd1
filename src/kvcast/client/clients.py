"""`RankerClient` and `AsyncRankerClient`: check a request, send it (again, if need be), check the answer.

What both do is written once: what is said in `Conversation`, in which order in `_Settings`, as steps that each class
takes in its own way of waiting. How bytes travel is in `transport`, when to try again in `retry`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from kvcast.client.ranking import Ranking
from kvcast.client.retry import Answer, Deadline, Pause, Retries, RetryPolicy, Send, Steps
from kvcast.client.transport import (
    AsyncTransport,
    Call,
    Protocol,
    Tensors,
    TlsOptions,
    Transport,
    open_async_transport,
    open_transport,
)
from kvcast.protocol.errors import InvalidRequestError, KvcastError, ServerFaultError, TryAgainError
from kvcast.protocol.manifest import Manifest, parse_manifest
from kvcast.protocol.report import Report
from kvcast.protocol.routing import hash_history, hash_user
from kvcast.protocol.tensors import (
    CANDIDATES,
    ENCODE_REPORT,
    FUSE_REPORT,
    HISTORY,
    KV_ID,
    MANIFEST,
    PREFETCH_PARAMETER,
    RANKER,
    RANKER_RESIDENT,
    REPORT_PARAMETER,
    SCORES,
    USER_ENCODER,
)
from kvcast.protocol.validation import check_candidates, check_history

Result = TypeVar("Result")
UserId = str | int

DEFAULT_DEADLINE = 30.0
DEFAULT_RETRY = RetryPolicy()
DEFAULT_ADDRESSES: dict[Protocol, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


class Conversation:
    """The parts of a ranking that need no connection: what to send, and what to make of the answer."""

    def __init__(self, manifest: Manifest, model: str = RANKER.name) -> None:
        self.manifest = manifest
        self.model = model

    @staticmethod
    def ask_manifest(model: str) -> Call:
        """Return the call that asks for the manifest: of the model itself if it has one, else of the encoder."""
        spec = RANKER_RESIDENT if model == RANKER_RESIDENT.name else USER_ENCODER
        # What is not read may be anything.
        unread: Tensors = {tensor.name: np.zeros((1, 1, 1), np.int64) for tensor in spec.inputs}
        return Call(spec.name, unread, [MANIFEST.name])

    def ask_scores(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        report: bool = False,
    ) -> Call:
        """Return the call that ranks.

        Raises:
            InvalidRequestError: history or candidates are not what the server's manifest says.
        """
        manifest = self.manifest
        rows = _as_array(CANDIDATES.name, candidates)
        if rows.shape[:1] == (0,) and rows.ndim <= 2:
            rows = self._no_candidates
        inputs: Tensors = {
            HISTORY.name: self._check_history(history),
            CANDIDATES.name: check_candidates(rows[None], manifest.candidate_fields, manifest.limits),
        }
        key = choose_routing_key(user_id, inputs[HISTORY.name])
        if not report:
            return Call(self.model, inputs, [SCORES.name], routing_key=key)
        outputs = [SCORES.name, ENCODE_REPORT.name, FUSE_REPORT.name]
        return Call(self.model, inputs, outputs, {REPORT_PARAMETER: True}, routing_key=key)

    def ask_prefetch(self, history: npt.ArrayLike, *, user_id: UserId | None = None) -> Call:
        """Return the call that encodes and caches a user: no KV comes back.

        Raises:
            InvalidRequestError: the history is not what the server's manifest says.
            ValueError: the model has no cache of its own.
        """
        inputs: Tensors = {HISTORY.name: self._check_history(history)}
        key = choose_routing_key(user_id, inputs[HISTORY.name])
        if self.model == RANKER.name:
            outputs = [KV_ID.name, ENCODE_REPORT.name]
            return Call(USER_ENCODER.name, inputs, outputs, {REPORT_PARAMETER: True}, routing_key=key)
        if self.model != RANKER_RESIDENT.name:
            raise ValueError(f"prefetch: expected model {RANKER.name} or {RANKER_RESIDENT.name}, got {self.model!r}")
        inputs[CANDIDATES.name] = self._no_candidates[None]
        parameters = {REPORT_PARAMETER: True, PREFETCH_PARAMETER: True}
        return Call(self.model, inputs, [ENCODE_REPORT.name], parameters, routing_key=key)

    @staticmethod
    def conclude(call: Call, answer: Answer) -> Ranking:
        """Return the ranking.

        Raises:
            ServerFaultError: the scores are not one finite number a candidate.
        """
        candidates, scores = call.inputs[CANDIDATES.name][0], answer.outputs[SCORES.name]
        if scores.shape != (1, len(candidates)) or not np.isfinite(scores).all():
            raise ServerFaultError(
                f"{SCORES.name}: expected {len(candidates)} finite numbers, got shape {list(scores.shape)}"
            )
        return Ranking(scores[0], candidates, answer.seconds, read_report(answer.outputs), answer.attempts)

    def _check_history(self, history: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return `[1, L, history_fields]`."""
        fields = self.manifest.history_fields
        events = _as_array(HISTORY.name, history)
        if events.shape[:1] == (0,) and events.ndim <= 2:
            events = np.zeros((0, len(fields)), np.int64)  # [] is a user without history
        return check_history(events[None], fields, self.manifest.limits)

    @property
    def _no_candidates(self) -> npt.NDArray[np.int64]:
        return np.zeros((0, len(self.manifest.candidate_fields)), np.int64)


class _Settings:
    """What both clients are told, what they remember, and their calls as steps."""

    def __init__(
        self,
        address: str | None = None,
        *,
        protocol: Protocol = "grpc",
        model: str = RANKER.name,
        deadline: float = DEFAULT_DEADLINE,
        retry: RetryPolicy = DEFAULT_RETRY,
        tls: TlsOptions | None = None,
        transport: Any = None,
    ) -> None:
        """Prepare a client; nothing is sent before the first call.

        Args:
            address: `host:port`; by default this machine's usual port for the protocol.
            protocol: `grpc` or `http`.
            model: `ranker`, `ranker_resident`, or another model of the same wire.
            deadline: seconds that a whole call may take, unless it brings its own: all attempts, the pauses between
                them, and asking for the manifest, which the first call does.
            retry: when to send again what the server could not answer; `NO_RETRIES` is never.
            tls: encrypt the connection (gRPC only).
            transport: a `Transport` (`AsyncTransport`) of one's own, instead of one to the address.

        Raises:
            ValueError: the protocol is another, or the deadline not a positive number, or TLS is asked of HTTP.
        """
        self._protocol = _check_protocol(protocol)
        if tls is not None and protocol != "grpc":
            raise ValueError(f"tls: expected protocol grpc, got {protocol}: put a proxy before HTTP")
        self._address = address or DEFAULT_ADDRESSES[protocol]
        self._model = model
        self._deadline = _check_deadline(deadline)
        self._tls = tls
        self._retries = Retries(retry, self._address)
        self._manifest: Manifest | None = None
        self._transport = transport or self._open()

    def _open(self) -> Any:
        """Return a transport to the address."""
        raise NotImplementedError

    def _start(self, deadline: float | None) -> Deadline:
        return self._retries.start(self._deadline if deadline is None else _check_deadline(deadline))

    def _rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        user_id: UserId | None,
        deadline: float | None,
        *,
        report: bool,
    ) -> Steps[Ranking]:
        whole = self._start(deadline)
        call = yield from self._prepare(
            lambda talk: talk.ask_scores(history, candidates, user_id=user_id, report=report), whole
        )
        answer = yield from self._retries.exchange(call, whole)
        return Conversation.conclude(call, answer)

    def _prefetch(self, history: npt.ArrayLike, user_id: UserId | None, deadline: float | None) -> Steps[Report]:
        whole = self._start(deadline)
        call = yield from self._prepare(lambda talk: talk.ask_prefetch(history, user_id=user_id), whole)
        answer = yield from self._retries.exchange(call, whole)
        return _expect_report(answer.outputs)

    def _prepare(self, ask: Callable[[Conversation], Call], deadline: Deadline) -> Steps[Call]:
        manifest = yield from self._know_manifest(deadline)
        try:
            return ask(Conversation(manifest, self._model))
        except InvalidRequestError:
            # The server may have moved on to a release with a larger vocabulary since it was asked. Once: a server
            # that is away must not keep the caller of a wrong request waiting.
            with contextlib.suppress(TryAgainError, ServerFaultError):
                yield from self._ask_manifest(deadline, once=True)
            current = yield from self._know_manifest(deadline)
            if current == manifest:
                raise
            return ask(Conversation(current, self._model))

    def _know_manifest(self, deadline: Deadline) -> Steps[Manifest]:
        if self._manifest is not None:
            return self._manifest
        return (yield from self._ask_manifest(deadline))

    def _ask_manifest(self, deadline: Deadline, *, once: bool = False) -> Steps[Manifest]:
        answer = yield from self._retries.exchange(Conversation.ask_manifest(self._model), deadline, once=once)
        self._manifest = _read_manifest(answer.outputs)
        return self._manifest

    def _get_manifest(self, deadline: float | None, *, refresh: bool) -> Steps[Manifest]:
        whole = self._start(deadline)
        return self._ask_manifest(whole) if refresh else self._know_manifest(whole)


class RankerClient(_Settings):
    """Ranks candidates on one server; safe to use from several threads, and a context manager."""

    _transport: Transport

    def _open(self) -> Transport:
        return open_transport(self._protocol, self._address, self._tls)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def get_manifest(self, *, refresh: bool = False, deadline: float | None = None) -> Manifest:
        """Return what the server serves: fields, vocabularies, limits, release. Asked once, unless `refresh`.

        Raises:
            TryAgainError, ServerFaultError: as `rank`.
        """
        return self._follow(self._get_manifest(deadline, refresh=refresh))

    def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        deadline: float | None = None,
        report: bool = False,
    ) -> Ranking:
        """Score a user's candidates.

        Args:
            history: integers `[L, history_fields]`, oldest event first; L = 0 is a new user.
            candidates: integers `[N, T]`, N at least 1.
            user_id: whose history it is; where a proxy stands before several servers, it sends a user to the one
                that has cached the user. Only a hash of it is sent. Without it, equal histories go to one server.
            deadline: seconds that the whole call may take, with all its attempts.
            report: ask the server how it made the scores; the answer is the ranking's `report`.

        Returns:
            Scores in the caller's order.

        Raises:
            InvalidRequestError: the request is wrong, said by this side or by the server.
            TryAgainError: the server is away or busy (`BusyError`), or the deadline has passed
                (`DeadlineExceededError`), after the attempts that the retry policy allows.
            ServerFaultError: the server's answer cannot be used.
        """
        return self._follow(self._rank(history, candidates, user_id, deadline, report=report))

    def prefetch(
        self, history: npt.ArrayLike, *, user_id: UserId | None = None, deadline: float | None = None
    ) -> Report:
        """Encode and cache a user now, while retrieval still runs: a later `rank` is a cache hit.

        Args:
            history: integers `[L, history_fields]`, oldest event first, as `rank` will be given it.
            user_id: as `rank` will be given it, so that both reach the same server.
            deadline: seconds that the whole call may take, with all its attempts.

        Returns:
            `cache` is `miss` if the user was encoded now, `hit` if the KV was there already, and `off` if the server
            cannot cache it: then nothing was computed.

        Raises:
            InvalidRequestError, TryAgainError, ServerFaultError: as `rank`.
            ValueError: this client's model has no cache.
        """
        return self._follow(self._prefetch(history, user_id, deadline))

    def _follow(self, steps: Steps[Result]) -> Result:
        """Take the steps of a call one after the other; return what they come to."""
        try:
            step = next(steps)
            while True:
                try:
                    outputs = self._take(step)
                except KvcastError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outputs)
        except StopIteration as end:
            return cast(Result, end.value)

    def _take(self, step: Send | Pause) -> Tensors:
        if isinstance(step, Send):
            return self._transport.infer(step.call, step.deadline)
        time.sleep(step.seconds)
        return {}


class AsyncRankerClient(_Settings):
    """`RankerClient` for asyncio: the same calls, awaited; an asynchronous context manager.

    It is made inside a running event loop.
    """

    _transport: AsyncTransport

    def _open(self) -> AsyncTransport:
        return open_async_transport(self._protocol, self._address, self._tls)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def get_manifest(self, *, refresh: bool = False, deadline: float | None = None) -> Manifest:
        """Return what the server serves, as `RankerClient.get_manifest`."""
        return await self._follow(self._get_manifest(deadline, refresh=refresh))

    async def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        deadline: float | None = None,
        report: bool = False,
    ) -> Ranking:
        """Score a user's candidates, as `RankerClient.rank`."""
        return await self._follow(self._rank(history, candidates, user_id, deadline, report=report))

    async def prefetch(
        self, history: npt.ArrayLike, *, user_id: UserId | None = None, deadline: float | None = None
    ) -> Report:
        """Encode and cache a user now, as `RankerClient.prefetch`."""
        return await self._follow(self._prefetch(history, user_id, deadline))

    async def _follow(self, steps: Steps[Result]) -> Result:
        """Take the steps of a call one after the other; a cancellation ends them where they are."""
        try:
            step = next(steps)
            while True:
                try:
                    outputs = await self._take(step)
                except KvcastError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outputs)
        except StopIteration as end:
            return cast(Result, end.value)

    async def _take(self, step: Send | Pause) -> Tensors:
        if isinstance(step, Send):
            return await self._transport.infer(step.call, step.deadline)
        await asyncio.sleep(step.seconds)
        return {}


def choose_routing_key(user_id: UserId | None, history: npt.NDArray[np.int64]) -> str | None:
    """Return the key of a user: by id where there is one, else by the history, which is what can be found again."""
    return hash_history(history) if user_id in (None, "") else hash_user(user_id)


def read_report(outputs: Tensors) -> Report | None:
    """Return what the report tensors among the outputs say, None if there are none.

    Raises:
        ServerFaultError: they do not hold a report of one user.
    """
    arrays = [outputs[tensor.name] for tensor in (ENCODE_REPORT, FUSE_REPORT) if tensor.name in outputs]
    if any(array.size != 1 for array in arrays):
        raise ServerFaultError(f"report: expected one user's, got shapes {[list(array.shape) for array in arrays]}")
    return Report.merge(*(array.reshape(-1)[0].decode() for array in arrays)) if arrays else None


def _expect_report(outputs: Tensors) -> Report:
    report = read_report(outputs)
    if report is None:
        raise ServerFaultError("report: the server sent none")
    return report


def _as_array(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidRequestError(
            f"{name}: expected a rectangular array of integers, got rows of different lengths"
        ) from error


def _check_protocol(protocol: Protocol) -> Protocol:
    if protocol not in DEFAULT_ADDRESSES:
        raise ValueError(f"protocol: expected grpc or http, got {protocol!r}")
    return protocol


def _check_deadline(deadline: float) -> float:
    if not 0 < deadline < float("inf"):
        raise ValueError(f"deadline: expected a positive number of seconds, got {deadline}")
    return deadline


def _read_manifest(outputs: Tensors) -> Manifest:
    array = outputs[MANIFEST.name]
    if array.size != 1:
        raise ServerFaultError(f"{MANIFEST.name}: expected one string, got shape {list(array.shape)}")
    return parse_manifest(array.reshape(-1)[0].decode())

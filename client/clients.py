"""`RankerClient` and `AsyncRankerClient`: check a request, send it, check the answer.

What both do is written once, in `Conversation`; the two classes differ in how they wait. Neither knows how bytes
travel (`transport`).
"""

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvcast.client.ranking import Ranking
from kvcast.client.transport import (
    AsyncGrpcTransport,
    AsyncHttpTransport,
    AsyncTransport,
    Call,
    GrpcTransport,
    HttpTransport,
    Protocol,
    Tensors,
    Transport,
)
from kvcast.contract.errors import InvalidRequestError, ServerFaultError, TryAgainError
from kvcast.contract.manifest import Manifest, parse_manifest
from kvcast.contract.report import Report
from kvcast.contract.tensors import (
    CANDIDATES,
    ENCODE_REPORT,
    FUSE_REPORT,
    HISTORY,
    MANIFEST,
    PREFETCH_PARAMETER,
    RANKER,
    RANKER_RESIDENT,
    RELEASE,
    REPORT_PARAMETER,
    SCORES,
    USER_ENCODER,
)
from kvcast.contract.validation import check_candidates, check_history

DEFAULT_DEADLINE = 30.0
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

    def ask_scores(self, history: npt.ArrayLike, candidates: npt.ArrayLike, *, report: bool = False) -> Call:
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
        if not report:
            return Call(self.model, inputs, [SCORES.name])
        outputs = [SCORES.name, ENCODE_REPORT.name, FUSE_REPORT.name]
        return Call(self.model, inputs, outputs, {REPORT_PARAMETER: True})

    def ask_prefetch(self, history: npt.ArrayLike) -> Call:
        """Return the call that encodes and keeps a user: no KV comes back.

        Raises:
            InvalidRequestError: the history is not what the server's manifest says.
            ValueError: the model keeps no users.
        """
        inputs: Tensors = {HISTORY.name: self._check_history(history)}
        if self.model == RANKER.name:
            outputs = [RELEASE.name, ENCODE_REPORT.name]
            return Call(USER_ENCODER.name, inputs, outputs, {REPORT_PARAMETER: True})
        if self.model != RANKER_RESIDENT.name:
            raise ValueError(f"prefetch: expected model {RANKER.name} or {RANKER_RESIDENT.name}, got {self.model!r}")
        inputs[CANDIDATES.name] = self._no_candidates[None]
        parameters = {REPORT_PARAMETER: True, PREFETCH_PARAMETER: True}
        return Call(self.model, inputs, [ENCODE_REPORT.name], parameters)

    @staticmethod
    def conclude(call: Call, outputs: Tensors, seconds: float) -> Ranking:
        """Return the ranking.

        Raises:
            ServerFaultError: the scores are not one finite number a candidate.
        """
        candidates, scores = call.inputs[CANDIDATES.name][0], outputs[SCORES.name]
        if scores.shape != (1, len(candidates)) or not np.isfinite(scores).all():
            raise ServerFaultError(
                f"{SCORES.name}: expected {len(candidates)} finite numbers, got shape {list(scores.shape)}"
            )
        return Ranking(scores[0], candidates, seconds, read_report(outputs))

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
    """What both clients are told, and what they remember."""

    def __init__(
        self,
        address: str | None = None,
        *,
        protocol: Protocol = "grpc",
        model: str = RANKER.name,
        deadline: float = DEFAULT_DEADLINE,
    ) -> None:
        """Prepare a client; nothing is sent before the first call.

        Args:
            address: `host:port`; by default this machine's usual port for the protocol.
            protocol: `grpc` or `http`.
            model: `ranker`, `ranker_resident`, or another model of the same wire.
            deadline: seconds that an exchange with the server may take, unless a call brings its own. A first
                call has two exchanges: it asks for the manifest too.

        Raises:
            ValueError: the protocol is another, or the deadline not a positive number.
        """
        self._protocol = _check_protocol(protocol)
        self._address = address or DEFAULT_ADDRESSES[protocol]
        self._model = model
        self._deadline = _check_deadline(deadline)
        self._manifest: Manifest | None = None
        self._open()

    def _open(self) -> None:
        """Make the transport."""
        raise NotImplementedError

    def _resolve(self, deadline: float | None) -> float:
        return self._deadline if deadline is None else _check_deadline(deadline)


class RankerClient(_Settings):
    """Ranks candidates on one server; safe to use from several threads, and a context manager."""

    def _open(self) -> None:
        transports: dict[Protocol, type[GrpcTransport | HttpTransport]] = {
            "grpc": GrpcTransport,
            "http": HttpTransport,
        }
        self._transport: Transport = transports[self._protocol](self._address)

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
        """Return what the server serves: fields, vocabularies, limits, release. Asked once, unless `refresh`."""
        known = self._manifest
        if known is None or refresh:
            outputs = self._transport.infer(Conversation.ask_manifest(self._model), self._resolve(deadline))
            known = self._manifest = _read_manifest(outputs)
        return known

    def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        deadline: float | None = None,
        report: bool = False,
    ) -> Ranking:
        """Score a user's candidates.

        Args:
            history: integers `[L, history_fields]`, oldest event first; L = 0 is a new user.
            candidates: integers `[N, T]`, N at least 1.
            deadline: seconds that an exchange with the server may take.
            report: ask the server how it made the scores; the answer is the ranking's `report`.

        Returns:
            Scores in the caller's order.

        Raises:
            InvalidRequestError: the request is wrong, said by this side or by the server.
            TryAgainError: the server is away or busy, or the deadline has passed.
            ServerFaultError: the server's answer cannot be used.
        """
        seconds = self._resolve(deadline)
        call = self._prepare(lambda talk: talk.ask_scores(history, candidates, report=report), seconds)
        started = time.perf_counter()
        outputs = self._transport.infer(call, seconds)
        return Conversation.conclude(call, outputs, time.perf_counter() - started)

    def prefetch(self, history: npt.ArrayLike, *, deadline: float | None = None) -> Report:
        """Encode a user now and keep the KV on the server, while retrieval still runs: a later `rank` finds it.

        Args:
            history: integers `[L, history_fields]`, oldest event first, as `rank` will be given it.
            deadline: seconds that an exchange with the server may take.

        Returns:
            `cache` is `miss` if the user was encoded now, `hit` if the KV was there already, and `off` if the server
            cannot keep it: then nothing was computed.

        Raises:
            InvalidRequestError, TryAgainError, ServerFaultError: as `rank`.
            ValueError: this client's model keeps no users.
        """
        seconds = self._resolve(deadline)
        call = self._prepare(lambda talk: talk.ask_prefetch(history), seconds)
        return _expect_report(self._transport.infer(call, seconds))

    def _prepare(self, ask: Callable[[Conversation], Call], deadline: float) -> Call:
        manifest = self.get_manifest(deadline=deadline)
        try:
            return ask(Conversation(manifest, self._model))
        except InvalidRequestError:
            # The server may have moved on to a release with a larger vocabulary since it was asked.
            with contextlib.suppress(TryAgainError, ServerFaultError):
                self.get_manifest(refresh=True, deadline=deadline)
            current = self.get_manifest(deadline=deadline)
            if current == manifest:
                raise
            return ask(Conversation(current, self._model))


class AsyncRankerClient(_Settings):
    """`RankerClient` for asyncio: the same calls, awaited; an asynchronous context manager.

    It is made inside a running event loop.
    """

    def _open(self) -> None:
        transports: dict[Protocol, type[AsyncGrpcTransport | AsyncHttpTransport]] = {
            "grpc": AsyncGrpcTransport,
            "http": AsyncHttpTransport,
        }
        self._transport: AsyncTransport = transports[self._protocol](self._address)

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
        known = self._manifest
        if known is None or refresh:
            outputs = await self._transport.infer(Conversation.ask_manifest(self._model), self._resolve(deadline))
            known = self._manifest = _read_manifest(outputs)
        return known

    async def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        deadline: float | None = None,
        report: bool = False,
    ) -> Ranking:
        """Score a user's candidates, as `RankerClient.rank`."""
        seconds = self._resolve(deadline)
        call = await self._prepare(lambda talk: talk.ask_scores(history, candidates, report=report), seconds)
        started = time.perf_counter()
        outputs = await self._transport.infer(call, seconds)
        return Conversation.conclude(call, outputs, time.perf_counter() - started)

    async def prefetch(self, history: npt.ArrayLike, *, deadline: float | None = None) -> Report:
        """Encode a user now and keep the KV on the server, as `RankerClient.prefetch`."""
        seconds = self._resolve(deadline)
        call = await self._prepare(lambda talk: talk.ask_prefetch(history), seconds)
        return _expect_report(await self._transport.infer(call, seconds))

    async def _prepare(self, ask: Callable[[Conversation], Call], deadline: float) -> Call:
        manifest = await self.get_manifest(deadline=deadline)
        try:
            return ask(Conversation(manifest, self._model))
        except InvalidRequestError:
            with contextlib.suppress(TryAgainError, ServerFaultError):
                await self.get_manifest(refresh=True, deadline=deadline)
            current = await self.get_manifest(deadline=deadline)
            if current == manifest:
                raise
            return ask(Conversation(current, self._model))


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

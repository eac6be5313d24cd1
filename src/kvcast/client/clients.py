"""`RankerClient` and `AsyncRankerClient`: check a request, send it (again, if need be), check the answer.

What both do is written once: what is said in `Conversation`, in which order in `_Settings`, as steps that each class
takes in its own way of waiting. How bytes travel is in `transport`, when to try again in `retry`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, Self, TypedDict, TypeVar, Unpack, cast

import msgspec
import numpy as np
import numpy.typing as npt

from kvcast.client.address import KEEPALIVE_SECONDS, Address, Protocol, TlsOptions
from kvcast.client.ranking import Ranking
from kvcast.client.retry import Answer, Deadline, Pause, Retries, RetryPolicy, Send, Steps
from kvcast.client.transport import (
    AsyncTransport,
    Call,
    Tensors,
    Transport,
    check_headers,
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
    SCORE_TOLERANCE,
    SCORES,
    USER_ENCODER,
)
from kvcast.protocol.validation import check_candidates, check_history

Result = TypeVar("Result")
UserId = str | int
Headers = Mapping[str, str]
# A history and its candidates.
Pair = tuple[npt.ArrayLike, npt.ArrayLike]

DEFAULT_DEADLINE = 30.0
# Requests of `rank_many` in flight: some runs of the server ahead, and far from a full queue.
DEFAULT_CONCURRENCY = 16
# Who has histories truncated learns within so many seconds that a new release reads longer ones.
TRUNCATION_SECONDS = 60.0
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
        truncate: bool = False,
    ) -> Call:
        """Return the call that ranks all candidates, which `split` splits if there are too many.

        Raises:
            InvalidRequestError: history or candidates are not what the server's manifest says.
        """
        manifest, limits = self.manifest, self.manifest.limits
        rows = _as_array(CANDIDATES.name, candidates)
        if rows.shape[:1] == (0,) and rows.ndim <= 2:
            rows = self._no_candidates
        if limits.candidates > 1:
            limits = msgspec.structs.replace(limits, candidates=max(limits.candidates, len(rows) if rows.ndim else 0))
        inputs: Tensors = {
            HISTORY.name: self._check_history(history, truncate=truncate),
            CANDIDATES.name: check_candidates(rows[None], manifest.candidate_fields, limits),
        }
        key = choose_routing_key(user_id, inputs[HISTORY.name])
        if not report:
            return Call(self.model, inputs, [SCORES.name], routing_key=key)
        outputs = [SCORES.name, ENCODE_REPORT.name, FUSE_REPORT.name]
        return Call(self.model, inputs, outputs, {REPORT_PARAMETER: True}, routing_key=key)

    def split(self, call: Call) -> list[Call]:
        """Return a ranking in parts within the limit, all of which begin with the first candidate."""
        candidates, limit = call.inputs[CANDIDATES.name], self.manifest.limits.candidates
        if candidates.shape[1] <= limit:
            return [call]
        first, rest = candidates[:, :1], candidates[:, 1:]
        parts = [rest[:, start : start + limit - 1] for start in range(0, rest.shape[1], limit - 1)]
        return [
            replace(call, inputs={**call.inputs, CANDIDATES.name: np.concatenate([first, part], axis=1)})
            for part in parts
        ]

    @staticmethod
    def join(parts: Sequence[Ranking]) -> Ranking | None:
        """Return the ranking of all candidates; None if the parts come from different releases.

        Candidates are independent, so the candidate that all parts share scores the same in all of them.
        """
        first, *others = parts
        if not others:
            return first
        shared = np.array([part.scores[0] for part in parts])
        if np.ptp(shared) > SCORE_TOLERANCE * max(1.0, float(np.abs(shared).max())):
            return None
        return replace(
            first,
            scores=np.concatenate([first.scores, *(part.scores[1:] for part in others)]),
            candidates=np.concatenate([first.candidates, *(part.candidates[1:] for part in others)]),
            seconds=sum(part.seconds for part in parts),
            attempts=max(part.attempts for part in parts),
        )

    def ask_prefetch(self, history: npt.ArrayLike, *, user_id: UserId | None = None, truncate: bool = False) -> Call:
        """Return the call that encodes and caches a user: no KV comes back.

        Raises:
            InvalidRequestError: the history is not what the server's manifest says.
            ValueError: the model has no cache of its own.
        """
        inputs: Tensors = {HISTORY.name: self._check_history(history, truncate=truncate)}
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

    def _check_history(self, history: npt.ArrayLike, *, truncate: bool) -> npt.NDArray[np.int64]:
        """Return `[1, L, history_fields]`."""
        fields, limit = self.manifest.history_fields, self.manifest.limits.history
        events = _as_array(HISTORY.name, history)
        if events.shape[:1] == (0,) and events.ndim <= 2:
            events = np.zeros((0, len(fields)), np.int64)  # [] is a user without history
        if truncate and events.ndim == 2 and len(events) > limit:
            events = events[events.astype(bool).any(axis=1)][-limit:]  # padding is no event
        return check_history(events[None], fields, self.manifest.limits)

    @property
    def _no_candidates(self) -> npt.NDArray[np.int64]:
        return np.zeros((0, len(self.manifest.candidate_fields)), np.int64)


class CallOptions(TypedDict, total=False):
    """Keyword arguments of every call; `RankerClient.rank` explains them."""

    deadline: float | None
    headers: Headers | None


class RankOptions(CallOptions, total=False):
    """Those of a call that ranks."""

    report: bool
    truncate: bool


@dataclass(frozen=True)
class _Options:
    """The options of a call, with defaults; `whole` is the deadline of all of it."""

    whole: Deadline
    headers: Headers
    report: bool
    truncate: bool


class _Settings:
    """What both clients are told, what they remember, and their calls as steps."""

    _transport_kind: ClassVar[str]

    def __init__(  # noqa: PLR0913 nobody gives them all
        self,
        address: str | None = None,
        *,
        protocol: Protocol = "grpc",
        model: str = RANKER.name,
        deadline: float = DEFAULT_DEADLINE,
        retry: RetryPolicy = DEFAULT_RETRY,
        tls: TlsOptions | None = None,
        headers: Headers | None = None,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
        transport: Any = None,
    ) -> None:
        """Prepare a client; nothing is sent before the first call.

        Args:
            address: `host:port`, over HTTP also `http://host:port` or `https://host:port`; by default this machine's
                usual port for the protocol.
            protocol: `grpc` or `http`.
            model: `ranker`, `ranker_resident`, or another model of the same wire.
            deadline: seconds that a whole call may take, unless it brings its own: all attempts, the pauses between
                them, and asking for the manifest, which the first call does.
            retry: when to send again what the server could not answer; `NO_RETRIES` is never.
            tls: encrypt the connection.
            headers: HTTP headers, or gRPC metadata, of every call.
            keepalive_seconds: after so much silence a connection is tested: over gRPC while a call waits, over HTTP
                also between calls. From 5 up; `math.inf` is never.
            transport: a `Transport` (`AsyncTransport`) of one's own, instead of one to the address.

        Raises:
            ValueError: an argument cannot be; the message names it.
        """
        self._protocol = _check_protocol(protocol)
        address = address or DEFAULT_ADDRESSES[protocol]
        self._model = model
        self._deadline = _check_deadline(deadline)
        self._headers = check_headers(headers)
        self._retries = Retries(retry, address)
        self._manifest: Manifest | None = None
        self._manifest_came = 0.0
        self._transport = transport or open_transport(
            Address.parse(address, protocol, tls, keepalive_seconds), self._transport_kind
        )

    def _start(
        self,
        deadline: float | None = None,
        headers: Headers | None = None,
        *,
        report: bool = False,
        truncate: bool = False,
    ) -> _Options:
        whole = self._retries.start(self._deadline if deadline is None else _check_deadline(deadline))
        return _Options(whole, {**self._headers, **check_headers(headers)}, report, truncate)

    def _exchange(self, call: Call, options: _Options, *, once: bool = False) -> Steps[Answer]:
        return self._retries.exchange(replace(call, headers=options.headers), options.whole, once=once)

    def _rank(self, pair: Pair, user_id: UserId | None, options: _Options) -> Steps[Ranking]:
        def rank(talk: Conversation) -> Steps[Ranking]:
            call = talk.ask_scores(*pair, user_id=user_id, report=options.report, truncate=options.truncate)
            for _ in range(2):
                parts = []
                for part in talk.split(call):
                    answer = yield from self._exchange(part, options)
                    parts.append(talk.conclude(part, answer))
                ranking = talk.join(parts)
                if ranking is not None:
                    return ranking
            raise TryAgainError(f"candidates: the release changed while they were scored in {len(parts)} parts")

        return (yield from self._with_manifest(rank, options))

    def _prefetch(self, history: npt.ArrayLike, user_id: UserId | None, options: _Options) -> Steps[Report]:
        def prefetch(talk: Conversation) -> Steps[Report]:
            call = talk.ask_prefetch(history, user_id=user_id, truncate=options.truncate)
            answer = yield from self._exchange(call, options)
            return _expect_report(answer.outputs)

        return (yield from self._with_manifest(prefetch, options))

    def _with_manifest(self, ask: Callable[[Conversation], Steps[Result]], options: _Options) -> Steps[Result]:
        """Follow steps that need the manifest; once more if they are refused and the manifest was an old one."""
        manifest = yield from self._know_manifest(options)
        try:
            return (yield from ask(Conversation(manifest, self._model)))
        except InvalidRequestError:
            # The server may have moved on to a release with other limits or a larger vocabulary.
            current = yield from self._ask_manifest_once(options, manifest)
            if current == manifest:
                raise
        return (yield from ask(Conversation(current, self._model)))

    def _know_manifest(self, options: _Options) -> Steps[Manifest]:
        known = self._manifest
        if known is None:
            return (yield from self._ask_manifest(options))
        if options.truncate and time.monotonic() - self._manifest_came > TRUNCATION_SECONDS:
            return (yield from self._ask_manifest_once(options, known))
        return known

    def _ask_manifest_once(self, options: _Options, known: Manifest) -> Steps[Manifest]:
        """Ask for it, but keep nobody waiting for a server that is away: `known` is as good as we know."""
        with contextlib.suppress(TryAgainError, ServerFaultError):
            return (yield from self._ask_manifest(options, once=True))
        return known

    def _ask_manifest(self, options: _Options, *, once: bool = False) -> Steps[Manifest]:
        answer = yield from self._exchange(Conversation.ask_manifest(self._model), options, once=once)
        self._manifest, self._manifest_came = _read_manifest(answer.outputs), time.monotonic()
        return self._manifest

    def _get_manifest(self, options: _Options, *, refresh: bool) -> Steps[Manifest]:
        return self._ask_manifest(options) if refresh else self._know_manifest(options)


class RankerClient(_Settings):
    """Ranks candidates on one server; safe to use from several threads, and a context manager.

    A call after `close` is a RuntimeError; closing twice is none.
    """

    _transport: Transport
    _transport_kind = "SyncTransport"

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

    def get_manifest(self, *, refresh: bool = False, **options: Unpack[CallOptions]) -> Manifest:
        """Return what the server serves: fields, vocabularies, limits, release. Asked once, unless `refresh`.

        Raises:
            AddressError, TryAgainError, ServerFaultError: as `rank`.
        """
        return self._follow(self._get_manifest(self._start(**options), refresh=refresh))

    def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        **options: Unpack[RankOptions],
    ) -> Ranking:
        """Score a user's candidates.

        Args:
            history: integers `[L, history_fields]`, oldest event first; L = 0 is a new user.
            candidates: integers `[N, T]`, N at least 1; above the model's limit they are scored in several requests.
            user_id: whose history it is; where a proxy stands before several servers, it sends a user to the one
                that has cached the user. Only a hash of it is sent. Without it, equal histories go to one server.
            options: `deadline`, seconds that the whole call may take, with all its attempts; `headers` of this call,
                beside the client's; `report=True` asks the server how it made the scores (the ranking's `report`);
                `truncate=True` sends the newest events of a history above the model's limit, as training reads them,
                instead of refusing it.

        Returns:
            Scores in the caller's order.

        Raises:
            InvalidRequestError: the request is wrong, said by this side or by the server, or the address is
                (`AddressError`).
            TryAgainError: the server is away or busy (`BusyError`), or the deadline has passed
                (`DeadlineExceededError`), after the attempts that the retry policy allows. At an address where no
                server was ever reached it is `NoServerError`, an `AddressError` too, after a second.
            ServerFaultError: the server's answer cannot be used.
            ValueError: a header cannot be.
        """
        return self._follow(self._rank((history, candidates), user_id, self._start(**options)))

    def rank_many(
        self,
        pairs: Iterable[Pair],
        *,
        user_ids: Iterable[UserId | None] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        **options: Unpack[RankOptions],
    ) -> list[Ranking | KvcastError]:
        """Score the candidates of several users, each with its own L and N, in requests that the server batches.

        Args:
            pairs: a history and its candidates a user, as `rank` takes them.
            user_ids: as many, in the same order.
            concurrency: how many requests are in flight at a time.
            options: as `rank`; the deadline is that of all of it.

        Returns:
            A ranking a user, in order. Where one has failed its place holds the error that `rank` would have raised;
            the others are not lost.

        Raises:
            AddressError, TryAgainError, ServerFaultError: the server did not say what it serves, so that nobody was
                ranked.
            ValueError: a header, the concurrency or the number of user ids cannot be.
        """
        chosen = self._start(**options)
        jobs = _pair_up(pairs, user_ids, concurrency)
        self._follow(self._know_manifest(chosen))

        def rank_one(job: tuple[Pair, UserId | None]) -> Ranking | KvcastError:
            try:
                return self._follow(self._rank(*job, chosen))
            except KvcastError as error:
                return error

        with ThreadPoolExecutor(max(1, min(concurrency, len(jobs)))) as pool:
            return list(pool.map(rank_one, jobs))

    def prefetch(
        self,
        history: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        truncate: bool = False,
        **options: Unpack[CallOptions],
    ) -> Report:
        """Encode and cache a user now, while retrieval still runs: a later `rank` is a cache hit.

        Args:
            history: integers `[L, history_fields]`, oldest event first, as `rank` will be given it.
            user_id: as `rank` will be given it, so that both reach the same server.
            truncate: as `rank` will be given it.
            options: `deadline` and `headers`, as `rank`.

        Returns:
            `cache` is `miss` if the user was encoded now, `hit` if the KV was there already, and `off` if the server
            cannot cache it: then nothing was computed.

        Raises:
            InvalidRequestError, TryAgainError, ServerFaultError: as `rank`.
            ValueError: this client's model has no cache, or a header cannot be.
        """
        return self._follow(self._prefetch(history, user_id, self._start(truncate=truncate, **options)))

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

    It may be made anywhere, and belongs to the event loop of its first call: a call in another is a RuntimeError.
    """

    _transport: AsyncTransport
    _transport_kind = "AsyncTransport"

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

    async def get_manifest(self, *, refresh: bool = False, **options: Unpack[CallOptions]) -> Manifest:
        """Return what the server serves, as `RankerClient.get_manifest`."""
        return await self._follow(self._get_manifest(self._start(**options), refresh=refresh))

    async def rank(
        self,
        history: npt.ArrayLike,
        candidates: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        **options: Unpack[RankOptions],
    ) -> Ranking:
        """Score a user's candidates, as `RankerClient.rank`."""
        return await self._follow(self._rank((history, candidates), user_id, self._start(**options)))

    async def rank_many(
        self,
        pairs: Iterable[Pair],
        *,
        user_ids: Iterable[UserId | None] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        **options: Unpack[RankOptions],
    ) -> list[Ranking | KvcastError]:
        """Score the candidates of several users, as `RankerClient.rank_many`."""
        chosen = self._start(**options)
        jobs, turns = _pair_up(pairs, user_ids, concurrency), asyncio.Semaphore(concurrency)
        await self._follow(self._know_manifest(chosen))

        async def rank_one(job: tuple[Pair, UserId | None]) -> Ranking | KvcastError:
            async with turns:
                try:
                    return await self._follow(self._rank(*job, chosen))
                except KvcastError as error:
                    return error

        return await asyncio.gather(*map(rank_one, jobs))

    async def prefetch(
        self,
        history: npt.ArrayLike,
        *,
        user_id: UserId | None = None,
        truncate: bool = False,
        **options: Unpack[CallOptions],
    ) -> Report:
        """Encode and cache a user now, as `RankerClient.prefetch`."""
        return await self._follow(self._prefetch(history, user_id, self._start(truncate=truncate, **options)))

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


def _pair_up(
    pairs: Iterable[Pair], user_ids: Iterable[UserId | None] | None, concurrency: int
) -> list[tuple[Pair, UserId | None]]:
    """Return each pair with its user id."""
    if concurrency < 1:
        raise ValueError(f"concurrency: expected 1 or more, got {concurrency}")
    known = [(history, candidates) for history, candidates in pairs]
    users = [None] * len(known) if user_ids is None else list(user_ids)
    if len(users) != len(known):
        raise ValueError(f"user_ids: expected {len(known)}, one a pair, got {len(users)}")
    return list(zip(known, users, strict=True))


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

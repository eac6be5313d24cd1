"""A share of the requests as JSON, a line each: what was asked, how it was answered, how long it took.

No user data: sizes and times, never ids, histories, scores or routing keys. How a ranking was made its models say, in
lines of their own with the same `request_id` (`serving/request_log.py`). A full pipe must not delay callers: lines that
nobody reads are dropped, and the next line says how many.
"""

import asyncio
import contextlib
import datetime
import json
import queue
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcast.gateway.errors import spell
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.tensors import CANDIDATES, HISTORY

# Inputs whose second axis is logged, and the name of the field.
SIZES = {HISTORY.name: "events", CANDIDATES.name: "candidates"}
WAITING_LINES = 1000
MAX_ID = 128
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class Entry:
    """The line of one request, filled in while it is handled."""

    fields: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    sent: float = 0.0
    attempts: int = 0
    code: str = "OK"

    def describe(self, request_id: str, size: int, trace_parent: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Note what is asked.

        Args:
            request_id: the caller's; empty for none, and the one that was made here stays.
            size: bytes of the request.
            trace_parent: of the caller's trace, as W3C spells it; empty without one.
            shapes: of the inputs, with the axis of users.
        """
        self.started = time.monotonic()  # before this the request was on its way
        if request_id:
            self.fields["request_id"] = request_id[:MAX_ID]
        found = TRACE_PARENT.fullmatch(trace_parent)
        if found:
            self.fields["trace_id"] = found[1]
        self.fields["bytes"] = size
        for name, field_name in SIZES.items():
            shape = shapes.get(name, ())
            if len(shape) > 1:
                self.fields["users"], self.fields[field_name] = shape[0], shape[1]

    def note_sending(self) -> None:
        """Note that Triton is sent the request now."""
        self.sent = self.sent or time.monotonic()
        self.attempts += 1

    def to_line(self, release: str, dropped: int) -> str:
        """Return the line."""
        now = time.monotonic()
        line = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")} | self.fields
        line |= {
            "code": self.code,
            "attempts": self.attempts,
            "release": release[:12],
            "seconds": round(now - self.started, 6),
            "gate_seconds": round((self.sent or now) - self.started, 6),
        }
        return json.dumps(line | ({"dropped_lines": dropped} if dropped else {}))


class RequestLog:
    """Chooses requests, and writes their lines from a thread of its own."""

    def __init__(self, share: float, write: Callable[[str], None], draw: Callable[[], float] = random.random) -> None:
        """Start.

        Args:
            share: of the requests that are logged, 0 to 1.
            write: takes a line; it may take its time.
            draw: a random number, from 0 to below 1.
        """
        self.share = share
        self._write, self._draw = write, draw
        self._lines: queue.Queue[str] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        if share:
            threading.Thread(target=self._work, name="request log", daemon=True).start()

    @contextlib.contextmanager
    def follow(self, protocol: str, model: str, get_release: Callable[[], str]) -> Iterator[Entry | None]:
        """Give the entry of a request that is chosen, else None; write its line when the block ends, however it ends.

        Args:
            protocol: `grpc` or `http`.
            model: which it is for.
            get_release: returns what is served.
        """
        if not self.share or self._draw() >= self.share:
            yield None
            return
        entry = Entry({"request_id": secrets.token_hex(8), "protocol": protocol, "model": model[:MAX_ID]})
        try:
            yield entry
        except BaseException as error:
            entry.code = name_code(error)
            raise
        finally:
            self._put(entry, get_release())

    def _put(self, entry: Entry, release: str) -> None:
        try:
            self._lines.put_nowait(entry.to_line(release, self._dropped))
            self._dropped = 0
        except Exception:  # noqa: BLE001 no log is worth an answer: the queue is full, or a report is not one of ours
            self._dropped += 1

    def _work(self) -> None:
        while True:
            self._write(self._lines.get())


def name_code(error: BaseException) -> str:
    """Return gRPC's name for what went wrong."""
    if isinstance(error, KvcastError):
        return spell(error)[0]
    return "CANCELLED" if isinstance(error, asyncio.CancelledError | ConnectionError) else "INTERNAL"

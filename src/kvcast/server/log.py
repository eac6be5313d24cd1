"""The server's log, on the standard library's `logging`: launcher, tritonserver and gateway, one line a record.

`kvcast.server.…` are the launcher's own records, `kvcast.tritonserver` and `kvcast.gateway` the lines of the two
processes. A separate thread writes them: if standard error is not read, lines are dropped and counted, and neither the
supervisor nor the gateway, whose lines pass here, has to wait.
"""

import contextlib
import datetime
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

WAITING_LINES = 10_000
FLUSHED_WITHIN_SECONDS = 2.0
FORMATS = ("text", "json")
LAUNCHER = "kvcast.server"
# How tritonserver's lines begin: level, month and day.
TRITON_LINE = re.compile(r"([IWEF])\d{4} ")
TRITON_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}

root = logging.getLogger("kvcast")
root.addHandler(logging.NullHandler())  # silent without `open_log`
triton_logger = logging.getLogger("kvcast.tritonserver")
gateway_logger = logging.getLogger("kvcast.gateway")


@contextlib.contextmanager
def open_log(line_format: str = "text", stream: TextIO | None = None) -> Iterator[None]:
    """Write the log to a stream, standard error by default, until the block ends."""
    handler = ThreadHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if line_format == "json" else TextFormatter())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def log_triton(line: str) -> None:
    """Log a line of tritonserver at the level of its first letter."""
    found = TRITON_LINE.match(line)
    triton_logger.log(TRITON_LEVELS[found[1]] if found else logging.INFO, line)


class TextFormatter(logging.Formatter):
    """The lines as they are, the launcher's own after `kvcast:`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = super().format(record)
        return f"kvcast: {line}" if record.name.startswith(LAUNCHER) else line


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, source, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; the gateway's request log is JSON already."""
        message = super().format(record)
        if message.startswith("{"):
            return message
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        source = record.name.removeprefix("kvcast.").partition(".")[0]
        return json.dumps({"time": time, "level": record.levelname, "source": source, "message": message})


class ThreadHandler(logging.Handler):
    """Writes in a separate thread, which may block as long as the reader does."""

    def __init__(self, stream: TextIO) -> None:
        """Start the thread."""
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write the remaining lines, unless the reader blocks."""
        super().close()
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSHED_WITHIN_SECONDS)
        self._thread.join(FLUSHED_WITHIN_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                message = f"{dropped} lines before this one were dropped: the log was not read"
                line += "\n" + self.format(logging.LogRecord(LAUNCHER, logging.WARNING, "", 0, message, None, None))
            with contextlib.suppress(OSError, ValueError):  # the reader has gone
                print(line, file=self._stream, flush=True)

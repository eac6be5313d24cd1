"""The server's log, on the standard library's `logging`: launcher, tritonserver and gateway, one line a record.

`kvcast.server.…` are the launcher's own records, `kvcast.tritonserver` and `kvcast.gateway` the lines of the two
processes. A thread of its own writes them: if nobody reads standard error, lines are dropped and counted, and neither
the supervisor nor the gateway, whose lines pass here, has to wait.
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
root.addHandler(logging.NullHandler())  # silent unless somebody wants the log
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
    """Log a line of tritonserver at the level that its first letter says."""
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
    """Writes from a thread of its own, which may wait for the reader as long as it likes."""

    def __init__(self, stream: TextIO) -> None:
        """Start the thread."""
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written, soon."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, if somebody reads it."""
        super().close()
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSHED_WITHIN_SECONDS)
        self._thread.join(FLUSHED_WITHIN_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                message = f"{dropped} lines before this one were dropped: nobody read them"
                line += "\n" + self.format(logging.LogRecord(LAUNCHER, logging.WARNING, "", 0, message, None, None))
            with contextlib.suppress(OSError, ValueError):  # nobody is there to read
                print(line, file=self._stream, flush=True)

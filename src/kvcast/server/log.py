"""The server's log: lines on standard error, by a thread of its own.

Whoever reads them slowly, or not at all, must hold up neither the guard nor the supervisor, whose lines pass here: what
does not fit is dropped, and counted.
"""

import contextlib
import queue
import sys
import threading
from typing import TextIO

WAITING_LINES = 10_000
FLUSHED_WITHIN_SECONDS = 2.0


class Log:
    """Writes lines; safe to call from any thread."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        """Start the thread."""
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        """Have a line written, soon."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, if somebody reads it."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSHED_WITHIN_SECONDS)
        self._thread.join(FLUSHED_WITHIN_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                line += f"\nkvcast: {dropped} lines before this one were dropped: nobody read them"
            with contextlib.suppress(OSError, ValueError):  # nobody is there to read
                print(line, file=self._stream, flush=True)

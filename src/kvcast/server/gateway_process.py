"""A gateway as a process: started before Triton can answer, started again if it dies, stopped after its last answer.

Launcher and process share a socket pair: the configuration and then every state go one way, `Event`s the other.
"""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec

from kvcast.gateway.config import Event, GatewayConfig, State, decode_line, encode_line
from kvcast.server.installation import ServerError
from kvcast.server.log import gateway_logger

logger = logging.getLogger(__name__)

LISTENS_WITHIN_SECONDS = 30
KILL_AFTER_SECONDS = 2
PAUSE_SECONDS = 0.2
FAILURES_AT_START = 3
# A process that is held, and does not read what it is told, must not hold up the supervisor.
TOLD_WITHIN_SECONDS = 1.0


class GatewayProcess:
    """Keeps one gateway process running before one tritonserver."""

    def __init__(self, config: GatewayConfig) -> None:
        """Take what is handed to the process; nothing is started yet."""
        self._config = config
        self._state = State()
        self._process: subprocess.Popen[str] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()
        self._listens, self._is_ready, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._failures, self._last_line = 0, ""
        self._thread = threading.Thread(target=self._keep, name="gateway", daemon=True)

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, and wait until it listens.

        Raises:
            ServerError: it does not.
        """
        self._thread.start()
        deadline = time.monotonic() + LISTENS_WITHIN_SECONDS
        while not self._listens.wait(PAUSE_SECONDS):
            if self._failures >= FAILURES_AT_START or time.monotonic() > deadline:
                raise ServerError(f"the gateway did not start: {self._last_line or 'it wrote nothing'}")

    def tell(self, state: State) -> None:
        """Tell it how the server is; a process that is started again is told the last state."""
        with self._lock:
            self._state = state
            self._send(encode_line(state))

    def wait_until_ready(self) -> None:
        """Wait until it has heard that the server is ready.

        Raises:
            ServerError: it has not.
        """
        if not self._is_ready.wait(LISTENS_WITHIN_SECONDS):
            raise ServerError("the gateway did not become ready: its lines in the log say why")

    def stop(self, *, answers: bool = True) -> None:
        """Have it end: after it has answered what is there, or at once, if no answer could come."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if answers else signal.SIGINT)
        patience = self._config.serve.leave_seconds + self._config.serve.drain_seconds
        try:
            process.wait(patience + KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join(timeout=KILL_AFTER_SECONDS)

    def _send(self, line: bytes) -> None:
        if self._control is None:
            return
        try:
            self._control.sendall(line)
        except OSError:  # it has ended, or is held: half a line would be the end of it too
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            self._control = None

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                own, other = socket.socketpair()
                own.settimeout(TOLD_WITHIN_SECONDS)
                with own, other:
                    self._run(own, other)
            except OSError as error:  # no more processes or files: it may be better next time
                self._last_line = f"cannot be run: {error.strerror}"
                logger.warning(f"the gateway {self._last_line}")
            self._failures += 1
            if not self._stopping.is_set():
                logger.warning("the gateway has ended; starting it again")
                time.sleep(PAUSE_SECONDS)

    def _run(self, own: socket.socket, other: socket.socket) -> None:
        """Start the process once, and return when it has ended."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvcast.gateway", str(other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        other.close()
        with self._lock:
            self._control = own
            self._send(encode_line(self._config) + encode_line(self._state))
        threading.Thread(target=self._listen, args=(own,), name="gateway events", daemon=True).start()
        if self._stopping.is_set():  # told to stop while it was being started
            self._process.terminate()
        if self._process.stdout is not None:
            with self._process.stdout as lines:
                for line in lines:
                    self._last_line = line.strip()
                    gateway_logger.info(self._last_line)
        self._process.wait()
        with self._lock:
            self._control = None

    def _listen(self, own: socket.socket) -> None:
        """Take in what the process says of itself."""
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError), own.dup() as events:
            events.setblocking(True)
            for line in events.makefile("rb"):
                {Event.LISTENING: self._listens, Event.READY: self._is_ready}[decode_line(line, Event)].set()

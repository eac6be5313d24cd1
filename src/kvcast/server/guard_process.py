"""The guard as a process: started before Triton can answer, started again if it dies, stopped after its last answer."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcast.server.installation import ServerError

if TYPE_CHECKING:
    from kvcast.server.launcher import ServerSettings

LISTENS_WITHIN_SECONDS = 30
KILL_AFTER_SECONDS = 2
HEADER_VARIABLE = "KVCAST_GUARD_HEADER"
LISTENING = "kvcast guard: listening"
READY = "kvcast guard: ready"
PAUSE_SECONDS = 0.2
FAILURES_AT_START = 3


class GuardProcess:
    """Keeps one guard running before one tritonserver."""

    def __init__(
        self,
        settings: "ServerSettings",
        ports: Sequence[int],
        state_file: Path,
        header: tuple[str, str],
        log: Callable[[str], None],
    ) -> None:
        """Take note of what to guard.

        Args:
            settings: the public addresses, the limits, TLS.
            ports: Triton's own ports on this machine: HTTP, gRPC, metrics.
            state_file: what the supervisor says.
            header: opens Triton's HTTP inference.
            log: receives the guard's lines.
        """
        self._command = make_command(settings, ports, state_file)
        self._environment = {**os.environ, HEADER_VARIABLE: "=".join(header)}
        self._patience, self._log = settings.leave_seconds + settings.drain_seconds, log
        self._process: subprocess.Popen[str] | None = None
        self._listens, self._is_ready, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._failures, self._last_line = 0, ""
        self._thread = threading.Thread(target=self._keep, name="guard", daemon=True)

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
                raise ServerError(f"the guard did not start: {self._last_line or 'it wrote nothing'}")

    def wait_until_ready(self) -> None:
        """Wait until it has heard that the server is ready.

        Raises:
            ServerError: it has not.
        """
        if not self._is_ready.wait(LISTENS_WITHIN_SECONDS):
            raise ServerError("the guard did not become ready: its lines in the log say why")

    def stop(self, *, answers: bool = True) -> None:
        """Have it end: after it has answered who is there, or at once, if nobody could answer."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if answers else signal.SIGINT)
        try:
            process.wait(self._patience + KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join(timeout=KILL_AFTER_SECONDS)

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            if self._stopping.is_set():  # told to stop while it was being started
                self._process.terminate()
            if self._process.stdout is not None:
                with self._process.stdout as lines:
                    for line in lines:
                        self._last_line = line.strip()
                        self._log(self._last_line)
                        if line.startswith(LISTENING):
                            self._listens.set()
                        elif line.startswith(READY):
                            self._is_ready.set()
            self._process.wait()
            self._failures += 1
            if not self._stopping.is_set():
                self._log("kvcast: the guard has ended; starting it again")
                time.sleep(PAUSE_SECONDS)


def make_command(settings: "ServerSettings", ports: Sequence[int], state_file: Path) -> list[str]:
    """Return the guard's command line."""
    http_port, grpc_port, metrics_port = ports
    command = [sys.executable, "-m", "kvcast.gateway"]
    command += ["--http", f"{settings.host}:{settings.http_port}", "--upstream-http", f"127.0.0.1:{http_port}"]
    command += ["--grpc", f"{settings.host}:{settings.grpc_port}", "--upstream-grpc", f"127.0.0.1:{grpc_port}"]
    command += ["--metrics", f"{settings.host}:{settings.metrics_port}"]
    command += ["--upstream-metrics", f"127.0.0.1:{metrics_port}", "--state", str(state_file)]
    command += ["--drain-seconds", str(settings.drain_seconds), "--shadow", str(settings.shadow)]
    command += ["--log-requests", str(settings.log_requests)]
    command += ["--leave-seconds", str(settings.leave_seconds)]
    command += ["--in-flight", str(settings.in_flight), "--waiting", str(settings.waiting)]
    for flag, file in (
        ("--tls-certificate", settings.tls_certificate),
        ("--tls-key", settings.tls_key),
        ("--tls-client-ca", settings.tls_client_ca),
    ):
        command += [flag, str(file)] if file is not None else []
    return command

"""The tritonserver process: its start, its log, its end, and its restart after a crash."""

import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import psutil

from kvcast.protocol.tensors import KV_ORIGIN, KV_SECRET_VARIABLE
from kvcast.server import shared_memory
from kvcast.server.admin import Admin
from kvcast.server.installation import ServerError, find_installation
from kvcast.server.log import log_triton
from kvcast.server.stubs import check_numpy, list_stubs

GONE_WITHIN_SECONDS = 2
SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)
LIBC = ctypes.CDLL(None)
NICENESS = 5


class TritonProcess:
    """One tritonserver, and the stubs that it starts: all of them in one process group."""

    def __init__(self, flags: Sequence[str], models: Sequence[str], instance: str, admin: Admin) -> None:
        """Set up what `start` runs.

        flags: of the command line, without its backends' folder. models: those that must be ready. instance: the name
        of this server's shared memory.
        """
        self._flags, self._models, self._admin, self.instance = list(flags), list(models), admin, instance
        self.start_seconds = 0.0
        self._process: subprocess.Popen[str] | None = None
        self._tail: deque[str] = deque(maxlen=400)
        self._reader: threading.Thread | None = None
        self._claim: int | None = None
        self._command: list[str] = []
        self._environment: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._process.pid if self._process is not None else 0

    @property
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self, workspace: Path, timeout_seconds: float) -> None:
        """Start it, and wait until every model is loaded; workspace: a private folder, for links to the backends.

        Raises:
            ServerError: it cannot be run, stopped, or is not ready in time.
        """
        installation = find_installation(workspace, self._flags)
        self._command = [str(installation.binary), *installation.flags, *self._flags]
        # The stubs must not leave compiled files in a repository that is only read.
        own = {"PYTHONDONTWRITEBYTECODE": "1", KV_SECRET_VARIABLE: secrets.token_hex(int(KV_ORIGIN.axes[0]))}
        self._environment = {**os.environ, **installation.environment, **own}
        self._claim = shared_memory.claim(self.instance)
        self._run(timeout_seconds)

    def kill(self) -> None:
        """End it at once, like a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self, timeout_seconds: float) -> None:
        """Start it again after a crash.

        Raises:
            ServerError: as `start`.
        """
        self._end_group()
        shared_memory.remove_regions(self.instance)
        self._tail.clear()
        self._run(timeout_seconds)

    def stop(self, seconds: float) -> None:
        """Terminate it, kill it after so many seconds; remove its shared memory."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
            self._end_group()
        if self._claim is not None:
            shared_memory.release(self.instance)
            os.close(self._claim)
            self._claim = None

    def _run(self, timeout_seconds: float) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=() if self._claim is None else (self._claim,),
                start_new_session=True,  # Ctrl-C reaches only the launcher, which then stops the server
                preexec_fn=prepare_process,  # noqa: PLW1509 two system calls, nothing is imported or allocated
            )
        except OSError as error:
            raise ServerError(f"cannot run {self._command[0]}: {error.strerror}") from error
        self._reader = threading.Thread(target=self._read_log, name="tritonserver-log", daemon=True)
        self._reader.start()
        started = time.monotonic()
        self._wait_until_ready(self._process, timeout_seconds)
        self.start_seconds = time.monotonic() - started

    def _wait_until_ready(self, process: subprocess.Popen[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._finish_log()
                raise ServerError(f"tritonserver stopped at start-up: {explain(list(self._tail))}")
            if self._admin.is_ready():
                missing = self._admin.find_missing(self._models)
                shared_memory.hide_regions(self.instance)
                if missing:  # ready servers can lack a model
                    raise ServerError(f"tritonserver is up without {', '.join(missing)}: {explain(list(self._tail))}")
                check_numpy(self._admin.read_version(), list_stubs(process.pid))
                return
            time.sleep(0.1)
        raise ServerError(f"tritonserver was not ready after {seconds:.0f} s")

    def _read_log(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            with self._process.stdout as lines:
                for line in map(str.rstrip, lines):
                    self._tail.append(line)
                    log_triton(line)

    def _end_group(self) -> None:
        """Kill what is left of the server and its stubs, and wait until they are gone."""
        if self._process is None:
            return
        deadline = time.monotonic() + GONE_WITHIN_SECONDS
        while has_members(self._process.pid) and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            time.sleep(0.01)
        self._process.wait()
        self._finish_log()

    def _finish_log(self) -> None:
        """Wait for the last lines of a process that has ended."""
        if self._reader is not None:
            self._reader.join(timeout=2)


def prepare_process() -> None:
    """Terminate this process when its parent ends, even if killed, and give the gateway a higher priority.

    The gateway refuses requests in time only if it runs while the models have every core busy.
    """
    LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    LIBC.nice(NICENESS)


def has_members(group: int) -> bool:
    """Whether a process of this group is still running; a zombie is not."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def explain(log: list[str]) -> str:
    """Return the sentence of a server's log that is the reason for its stop."""
    for pattern in (
        r"error while loading shared libraries: (.+)",
        r"failed to load '.+?' version \d+: (?:\w+(?: \w+)?: )?(.+)",
        r"^E\d{4} .*?\] \"?(?!CudaDriverHelper)(.+?)\"?$",  # that one is every CPU machine's
        r"(?i)error: (.+)",
    ):
        for line in log:
            found = re.search(pattern, line)
            if found:
                return found.group(1).strip().rstrip('"')
    return log[-1] if log else "it wrote nothing"

"""One tritonserver process: started, watched until it is ready, stopped with everything that it started.

Binds to 127.0.0.1 unless told otherwise. Model control is explicit, and the APIs that change a server (repository,
shared memory, logging, trace) ask for a key that is made anew at each start and lies in a file only its owner
reads. Triton takes the key on its command line alone, so other users of the same machine can see it there.
"""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kvcast.server.installation import ServerError, find_installation
from kvcast.server.repository import check_port, check_repository, count_shared_memory

ADMIN_HEADER = "kvcast-admin-key"
RESTRICTED_APIS = "model-repository,shared-memory,logging,trace"
# An idle keep-alive connection holds Triton's shutdown for this whole time.
EXIT_TIMEOUT_SECONDS = 2
KILL_AFTER_SECONDS = EXIT_TIMEOUT_SECONDS + 2
GONE_WITHIN_SECONDS = 2
# Opening a model checks its files' hashes and runs it once: minutes for gigabytes on a slow disk.
STUB_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class ServerSettings:
    """What to serve and where. `config` is the name that the export must have, None for any."""

    repository: Path
    models: list[str] = field(default_factory=lambda: ["ranker"])
    config: str | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    start_timeout_seconds: float = 900
    extra_flags: list[str] = field(default_factory=list)


class TritonServer:
    """A running tritonserver; a context manager that leaves nothing behind.

    States: created → `start` → ready → `stop` → stopped. `stop` may be called in any of them, also twice.
    """

    def __init__(self, settings: ServerSettings, log: Callable[[str], None] = lambda _: None) -> None:
        """Take note of what to serve.

        Args:
            settings: what and where.
            log: receives every line that the server writes.
        """
        self.settings = settings
        self.process: subprocess.Popen[str] | None = None
        self._log = log
        self._tail: deque[str] = deque(maxlen=400)
        self._reader: threading.Thread | None = None
        self._workspace: Path | None = None
        self._admin_key = secrets.token_hex(16)
        self._instance = secrets.token_hex(4)

    def __enter__(self) -> Self:
        """Start, and wait until ready."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def http_address(self) -> str:
        """Host and port of the HTTP endpoint."""
        return f"{self.settings.host}:{self.settings.http_port}"

    @property
    def grpc_address(self) -> str:
        """Host and port of the gRPC endpoint."""
        return f"{self.settings.host}:{self.settings.grpc_port}"

    @property
    def metrics_address(self) -> str:
        """Host and port of the metrics endpoint."""
        return f"{self.settings.host}:{self.settings.metrics_port}"

    @property
    def admin_key_file(self) -> Path:
        """The file that holds the admin key, readable by its owner only."""
        if self._workspace is None:
            raise ServerError("the server is not running: start it first")
        return self._workspace / "admin-key"

    @property
    def admin_headers(self) -> dict[str, str]:
        """The HTTP header that opens the restricted APIs (over gRPC: `triton-grpc-protocol-` before its name)."""
        return {ADMIN_HEADER: self._admin_key}

    def start(self) -> None:
        """Check what can be checked, start the process and wait until every model answers ready.

        Raises:
            ServerError: something is missing, or the server stopped or did not become ready in time.
        """
        settings = self.settings
        manifest = check_repository(settings.repository, settings.models, settings.config)
        for port, purpose, variable in (
            (settings.http_port, "HTTP", "HTTP_PORT"),
            (settings.grpc_port, "gRPC", "GRPC_PORT"),
            (settings.metrics_port, "metrics", "METRICS_PORT"),
        ):
            check_port(settings.host, port, purpose, variable)
        self._workspace = Path(tempfile.mkdtemp(prefix="kvcast-"))
        installation = find_installation(self._workspace)
        self.admin_key_file.touch(mode=0o600)
        self.admin_key_file.write_text(self._admin_key + "\n")
        command = [
            str(installation.binary),
            *installation.flags,
            *self._make_flags(count_shared_memory(manifest, settings.models)),
        ]
        try:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **installation.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches this launcher alone, which then stops the server
            )
        except OSError as error:
            raise ServerError(f"cannot run {installation.binary}: {error.strerror}") from error
        self._reader = threading.Thread(target=self._read_log, name="tritonserver-log", daemon=True)
        self._reader.start()
        self._wait_until_ready()

    def stop(self) -> None:
        """Ask the server to end, then make it; remove its workspace and its shared memory."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(KILL_AFTER_SECONDS)
            self._kill_group()
            self.process.wait()
            self._finish_log()
            for region in Path("/dev/shm").glob(f"{self._shared_memory_prefix}*"):  # noqa: S108 ours by its prefix
                region.unlink(missing_ok=True)
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
            self._workspace = None

    def wait(self) -> int:
        """Wait until the process ends by itself; return its exit status."""
        if self.process is None:
            raise ServerError("the server is not running: start it first")
        return self.process.wait()

    @property
    def _shared_memory_prefix(self) -> str:
        return f"kvcast_{self._instance}_"

    def _make_flags(self, shared_memory_bytes: int) -> list[str]:
        settings, key = self.settings, f"{ADMIN_HEADER}={self._admin_key}"
        return [
            f"--model-repository={settings.repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in settings.models),
            # Every config.pbtxt is complete; without this, each model.py would be imported twice.
            "--disable-auto-complete-config",
            "--exit-on-error=true",
            f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
            f"--http-restricted-api={RESTRICTED_APIS}:{key}",
            f"--grpc-restricted-protocol={RESTRICTED_APIS}:{key}",
            f"--backend-config=python,shm-default-byte-size={shared_memory_bytes}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            f"--backend-config=python,stub-timeout-seconds={STUB_TIMEOUT_SECONDS}",
            *settings.extra_flags,
        ]

    def _read_log(self) -> None:
        if self.process is None or self.process.stdout is None:
            return
        with self.process.stdout as lines:
            for line in lines:
                self._tail.append(line.rstrip())
                self._log(line.rstrip())

    def _kill_group(self) -> None:
        """End what is left of the server and the stubs of its models, and wait until they are gone."""
        if self.process is None:
            return
        deadline = time.monotonic() + GONE_WITHIN_SECONDS
        while has_members(self.process.pid) and time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            time.sleep(0.01)

    def _finish_log(self) -> None:
        """Wait for the last lines of a process that has ended."""
        if self._reader is not None:
            self._reader.join(timeout=2)

    def _wait_until_ready(self) -> None:
        if self.process is None:
            return
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._finish_log()
                raise ServerError(f"tritonserver stopped at start-up: {explain(list(self._tail))}")
            if self._ask("GET", "/v2/health/ready")[0] == 200:
                self._check_models_are_ready()
                return
            time.sleep(0.1)
        raise ServerError(f"tritonserver was not ready after {self.settings.start_timeout_seconds:.0f} s")

    def _check_models_are_ready(self) -> None:
        """Ready servers can lack a model, so look each one up."""
        status, body = self._ask("POST", "/v2/repository/index")
        states = {entry["name"]: entry.get("state") for entry in json.loads(body)} if status == 200 else {}
        missing = [name for name in self.settings.models if states.get(name) != "READY"]
        if missing:
            raise ServerError(f"tritonserver is up without {', '.join(missing)}: {explain(list(self._tail))}")

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Return status and body of one HTTP request; status 0 where there is no answer."""
        connection = http.client.HTTPConnection(self.settings.host, self.settings.http_port, timeout=5)
        try:
            connection.request(method, path, headers=self.admin_headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def has_members(group: int) -> bool:
    """Whether a process of this group is still running (one that has ended but was not collected is not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(own_group) == group and state != "Z":
                return True
    return False


def explain(log: list[str]) -> str:
    """Return the one sentence of a server's log that says why it stopped."""
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


def write_line(line: str) -> None:
    """Pass a line of the server's log on to standard error."""
    print(line, file=sys.stderr, flush=True)

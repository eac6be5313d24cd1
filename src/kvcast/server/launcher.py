"""One tritonserver with its gateway: checks, start, supervision, stop.

Callers reach the gateway (`kvcast.gateway`); Triton itself listens on random local ports. The public address is
127.0.0.1 by default. Model control is explicit, and the APIs that change a server (repository, shared memory, logging,
trace) require a key that is generated at each start and stored in a file that only its owner can read. Triton accepts
the key only on its command line, where other users of the same machine can see it.
"""

import logging
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Self

from kvcast.gateway.config import LOOPBACK, GatewayConfig, ServeConfig, State
from kvcast.protocol.tensors import RANKER_FULL
from kvcast.server import shared_memory
from kvcast.server.admin import Admin
from kvcast.server.gateway_process import GatewayProcess
from kvcast.server.installation import ServerError
from kvcast.server.releases import ReleaseStore
from kvcast.server.repository import check_port, check_repository, count_shared_memory, expand_models, find_free_ports
from kvcast.server.supervisor import Supervisor
from kvcast.server.triton_process import TritonProcess
from kvcast.server.view import View, find_models

logger = logging.getLogger(__name__)

ADMIN_HEADER = "kvcast-admin-key"
INFERENCE_HEADER = "kvcast-inference-key"
RESTRICTED_APIS = "model-repository,shared-memory,logging,trace"
# When the gateway has ended, Triton has no requests left but those whose model process died; it would wait for them.
EXIT_TIMEOUT_SECONDS = 2
KILL_AFTER_SECONDS = EXIT_TIMEOUT_SECONDS + 2
# Opening a model checks its files' hashes and runs it once: minutes for gigabytes on a slow disk.
STUB_TIMEOUT_SECONDS = 600


class TritonServer:
    """A running tritonserver; a context manager that removes all that it made.

    States: created → `start` → ready → `stop` → stopped. `stop` may be called in any of them, also twice.
    """

    def __init__(self, settings: ServeConfig) -> None:
        """Make keys and choose ports; nothing is started yet."""
        self.settings = settings
        self.supervisor: Supervisor | None = None
        self._gateway: GatewayProcess | None = None
        self._triton: TritonProcess | None = None
        self._workspace: Path | None = None
        self._admin_key = secrets.token_hex(16)
        self._inference_key = secrets.token_hex(16)
        self._instance = secrets.token_hex(4)
        public = (settings.http_port, settings.grpc_port, settings.metrics_port)
        self._ports = tuple(find_free_ports(3)) if settings.is_guarded else public

    def __enter__(self) -> Self:
        """Start, and wait until ready."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self.stop()

    @property
    def loaded_models(self) -> list[str]:
        """The models that Triton loads: those asked for, and what the shadow needs."""
        return list(dict.fromkeys([*self.settings.models, *([RANKER_FULL.name] if self.settings.shadow else [])]))

    @property
    def http_address(self) -> str:
        """Host and port of the HTTP endpoint."""
        return f"{self.settings.host}:{self.settings.http_port}"

    @property
    def grpc_address(self) -> str:
        """Host and port of the gRPC endpoint."""
        return f"{self.settings.host}:{self.settings.grpc_port}"

    @property
    def direct_grpc_address(self) -> str:
        """Host and port of Triton's own gRPC endpoint, which bypasses the gateway."""
        return f"{self._bind_host}:{self._ports[1]}"

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

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self._triton.pid if self._triton is not None else 0

    @property
    def gateway_pid(self) -> int:
        """The process id of the gateway; 0 without one."""
        return self._gateway.pid if self._gateway is not None else 0

    def list_shared_memory(self) -> list[Path]:
        """Return the server's regions."""
        return shared_memory.list_regions(self._instance)

    def start(self) -> None:
        """Check the settings and files, start the processes, wait until every model answers the golden request.

        Raises:
            KvcastError: something is missing or wrong, or the server stopped or did not become ready in time.
        """
        settings, models = self.settings, self.loaded_models
        settings.check()
        manifest = check_repository(settings.repository, models, settings.config)
        for port, purpose, variable in (
            (settings.http_port, "HTTP", "HTTP_PORT"),
            (settings.grpc_port, "gRPC", "GRPC_PORT"),
            (settings.metrics_port, "metrics", "METRICS_PORT"),
        ):
            check_port(settings.host, port, purpose, variable)
        for instance in shared_memory.remove_leftovers():
            logger.info(f"removed the shared memory of {instance}, a server that was killed")
        region_bytes = count_shared_memory(manifest, models)
        shared_memory.check_room(region_bytes * len(expand_models(models)))
        self._workspace = Path(tempfile.mkdtemp(prefix="kvcast-"))
        self.admin_key_file.touch(mode=0o600)
        self.admin_key_file.write_text(self._admin_key + "\n")
        store = ReleaseStore(settings.repository)
        release = store.find_served(expand_models(models))
        admin = Admin(self._bind_host, self._ports[0], self.admin_headers | dict([self._inference_header]))
        self._triton = TritonProcess(self._make_flags(region_bytes), models, self._instance, admin)
        view = self._make_view(store, release)
        self.supervisor = Supervisor(self._triton, admin, view, store, self._tell)
        if settings.is_guarded:  # first, so that callers are told that the server is starting
            self._gateway = GatewayProcess(GatewayConfig(settings, *self._ports))
            self._gateway.start()
        self._triton.start(self._workspace, settings.start_timeout_seconds)
        self.supervisor.start(release)
        if self._gateway is not None:
            self._gateway.wait_until_ready()

    def stop(self) -> None:
        """Drain, end all processes, remove the workspace and the shared memory.

        It takes at most `leave_seconds`, `drain_seconds` and some 6 s; 20 s more if everything hangs.
        """
        if self._gateway is not None:
            # It answers all admitted requests; model processes that die meanwhile are still replaced.
            self._gateway.stop(answers=self.supervisor is None or not self.supervisor.has_failed)
            self._gateway = None
        if self.supervisor is not None:
            self.supervisor.stop()
        if self._triton is not None:
            # Without a gateway Triton itself waits for its callers.
            patience = 0.0 if self.settings.is_guarded else self.settings.drain_seconds
            self._triton.stop(patience + KILL_AFTER_SECONDS)
            self._triton = None
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
            self._workspace = None

    def wait(self) -> None:
        """Wait until stopped; raises if tritonserver ends by itself, or crashes too often."""
        if self.supervisor is None:
            raise ServerError("the server is not running: start it first")
        self.supervisor.wait()

    def _tell(self, state: State) -> None:
        gateway = self._gateway  # `stop` may take it away meanwhile
        if gateway is not None:
            gateway.tell(state)

    @property
    def _view_folder(self) -> Path:
        return self.admin_key_file.with_name("repository")

    @property
    def _inference_header(self) -> tuple[str, str]:
        return INFERENCE_HEADER, self._inference_key

    def _make_view(self, store: ReleaseStore, release: int) -> View:
        models = find_models(self.loaded_models)
        view = View(self.settings.repository, self._view_folder, models, self.settings.parameters)
        for model in models:
            if model.steps:
                view.pin(model.name, dict.fromkeys(model.steps, release))
            else:
                view.link(model.name, {release: store.find_folder(model.name, release)})
        return view

    @property
    def _bind_host(self) -> str:
        return LOOPBACK if self.settings.is_guarded else self.settings.host

    def _make_flags(self, region_bytes: int) -> list[str]:
        settings, key = self.settings, f"{ADMIN_HEADER}={self._admin_key}"
        http_port, grpc_port, metrics_port = self._ports
        exit_timeout = EXIT_TIMEOUT_SECONDS if settings.is_guarded else int(settings.drain_seconds)
        guarded = [f"--http-restricted-api=inference:{INFERENCE_HEADER}={self._inference_key}"]
        return [
            f"--model-repository={self._view_folder}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.loaded_models),
            # Every config.pbtxt is complete; without this, each model.py would be imported twice.
            "--disable-auto-complete-config",
            "--exit-on-error=true",
            f"--exit-timeout-secs={exit_timeout}",
            f"--http-address={self._bind_host}",
            f"--http-port={http_port}",
            f"--grpc-address={self._bind_host}",
            f"--grpc-port={grpc_port}",
            f"--metrics-address={self._bind_host}",
            f"--metrics-port={metrics_port}",
            f"--http-restricted-api={RESTRICTED_APIS}:{key}",
            f"--grpc-restricted-protocol={RESTRICTED_APIS}:{key}",
            *(guarded if settings.is_guarded else []),
            f"--backend-config=python,shm-default-byte-size={region_bytes}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory.make_prefix(self._instance)}",
            f"--backend-config=python,stub-timeout-seconds={STUB_TIMEOUT_SECONDS}",
            *settings.extra_flags,
        ]

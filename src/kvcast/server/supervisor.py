"""Supervises a running tritonserver: replaces model processes that die or hang, switches to the active release.

Triton does neither: it keeps passing requests to a dead process (github.com/triton-inference-server/server/issues/8604;
2.72 does too), and has no safe order for changing the parts of an ensemble. Both happen without a restart, while
traffic goes on. The result is published as a `State`.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait

from kvcast.gateway.config import State
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.golden import read_golden
from kvcast.protocol.manifest import RELEASES_FILE, read_manifest
from kvcast.protocol.tensors import ModelSpec
from kvcast.server import shared_memory
from kvcast.server.admin import Admin
from kvcast.server.installation import ServerError
from kvcast.server.releases import ReleaseStore
from kvcast.server.stubs import Stub, list_stubs
from kvcast.server.triton_process import TritonProcess
from kvcast.server.view import View

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
# A process that is stopped for this long counts as hung; a debugger or a snapshot may stop it for a moment.
HELD_SECONDS = 1.0
# After a repair that failed, the next waits twice as long, up to this.
LONGEST_PAUSE_SECONDS = 30.0
# A repair that takes longer than this, and than so many complete starts, never ends.
LEAST_REPAIR_SECONDS = 8.0
REPAIR_STARTS = 3
# A replaced process ends when its last request is answered. Requests of a dead process are never answered, so Triton
# never unloads that version; its other, living processes are killed after this long.
RETIRED_SECONDS = 60.0
STOPPED_WITHIN_SECONDS = 5.0
# A server that crashes more often than this within the window stays down.
MAX_CRASHES = 5
CRASH_WINDOW_SECONDS = 300
RESTARTED_WITHIN_SECONDS = 900
TRIAL_SUFFIX = "_trial"


class HangsError(ServerError):
    """Triton takes so long that it will never finish."""


class DiedMeanwhileError(ServerError):
    """A process died during a check, so the check has no result."""


class Supervisor:
    """Watches one server from a thread."""

    def __init__(
        self,
        triton: TritonProcess,
        admin: Admin,
        view: View,
        store: ReleaseStore,
        publish: Callable[[State], None],
    ) -> None:
        """Set up what `start` watches; publish: tells the gateway."""
        self._triton, self._admin, self._view, self._store = triton, admin, view, store
        self._ensembles = [model for model in view.models if model.steps]
        self._parts = [model.name for model in view.models if not model.steps]
        self._publish = publish
        self.state = State()
        self._watched: dict[int, Stub] = {}
        self._retired: dict[int, float] = {}
        self._held: dict[int, float] = {}
        self._pause, self._not_before = 0.0, 0.0
        self._record_seen: tuple[int, int] | None = None
        self._crashes: list[float] = []
        self._failure: ServerError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)

    def start(self, release: int) -> None:
        """Check the ensembles of the loaded release with the golden request, report ready, and start to watch.

        Raises:
            ServerError, ArtefactError: an ensemble does not answer the golden request as it should.
        """
        self._watched = list_stubs(self._triton.pid)
        self._check_ensembles(release)
        release_id = self._read_release_id(release)
        self._tell(is_ready=True, reason="", release_number=release, release_id=release_id)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; a repair in progress has a moment to finish."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOPPED_WITHIN_SECONDS)

    @property
    def has_failed(self) -> bool:
        """Whether Triton is down for good."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait until stopped; raises if tritonserver ends by itself, or crashes too often."""
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                if self._triton.status is not None:
                    self._restart(self._triton.status)
                else:
                    self._end_retired()
                    self._repair()
                    self._follow_record()
            except Exception:  # repairs depend on this thread
                logger.exception("unexpected error in the supervisor")

    def _check_ensembles(self, release: int, until: float = math.inf) -> None:
        """Send each ensemble the golden request; other models have checked it when they were loaded."""
        for ensemble in self._ensembles:
            self._check_golden(ensemble.name, ensemble, release, until)

    def _check_golden(self, name: str, ensemble: ModelSpec, release: int, until: float = math.inf) -> None:
        """Send an ensemble, under its own or a trial name, the golden request of a release."""
        golden = read_golden(self._store.find_folder(ensemble.steps[0], release))
        self._do_watching(lambda: self._admin.check_golden(name, golden), needed=ensemble.steps, until=until)

    def _do_watching(
        self,
        action: Callable[[], None],
        being_loaded: str = "",
        needed: Collection[str] = (),
        until: float = math.inf,
    ) -> None:
        """Run an action in a thread, and check the processes meanwhile.

        Args:
            action: what to run.
            being_loaded: a model whose processes come and go with it.
            needed: models without whose processes Triton may never finish.
            until: the deadline.

        Raises:
            DiedMeanwhileError: a process of a needed model has died.
            HangsError: the deadline has passed.
        """
        done: Future[None] = Future()

        def work() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 raised again by `result`
                done.set_exception(error)
            else:
                done.set_result(None)

        known = {model: self.state.deaths.get(model, 0) for model in needed}
        threading.Thread(target=work, name="admin", daemon=True).start()
        while not wait((done,), LOOK_SECONDS).done:
            self._notice_dead(being_loaded)
            for model in needed:
                if self.state.deaths.get(model, 0) != known[model]:
                    raise DiedMeanwhileError(f"a process of {model} died during the golden request")
            if time.monotonic() > until:
                raise HangsError("tritonserver has not finished in time")
        done.result()

    # -- dead processes

    def _restart(self, status: int) -> None:
        """Start tritonserver again after a crash, a limited number of times."""
        now = time.monotonic()
        self._crashes = [each for each in self._crashes if now - each < CRASH_WINDOW_SECONDS] + [now]
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        if status >= 0 or len(self._crashes) > MAX_CRASHES:
            how = "ended by itself" if status >= 0 else f"crashed for the {len(self._crashes)}th time in a row"
            self._failure = ServerError(f"tritonserver {how} ({name}); it stays down")
            self._tell(is_ready=False, reason=str(self._failure), is_draining=True)
            self._ended.set()
            return
        logger.warning(f"tritonserver crashed ({name}); starting it again")
        deaths = {model: self.state.deaths.get(model, 0) + 1 for model in self._parts}
        parts = tuple(self._parts)
        self._tell(is_ready=False, reason="tritonserver is being started again", broken=parts, deaths=deaths)
        try:
            self._triton.restart(RESTARTED_WITHIN_SECONDS)
            self._watched, self._retired, self._held = list_stubs(self._triton.pid), {}, {}
            self._check_ensembles(self.state.release_number)
        except KvcastError as error:
            logger.warning(f"{error}")
            self._tell(reason=str(error))
            self._ended.wait(min(2.0 ** len(self._crashes), LONGEST_PAUSE_SECONDS))
            return
        logger.info(f"tritonserver is back after {time.monotonic() - now:.1f} s")
        self._tell(
            is_ready=True, reason="", broken=(), repairs=self.state.repairs + 1, restarts=self.state.restarts + 1
        )

    def _repair(self) -> None:
        """Replace the processes of models of which one has died or hangs."""
        self._notice_dead()
        if self.state.broken and time.monotonic() >= self._not_before:
            self._replace(self.state.broken)

    def _notice_dead(self, being_loaded: str = "") -> None:
        """Publish which processes have died, those of a model that is being loaded excepted."""
        dead = [stub for stub in self._find_dead() if stub.model != being_loaded]
        for stub in dead:
            logger.warning(f"process {stub.pid} of {stub.model} died; replacing it")
            del self._watched[stub.pid]
        if dead:
            deaths = dict(self.state.deaths)
            for stub in dead:
                deaths[stub.model] = deaths.get(stub.model, 0) + 1
            self._tell_broken({*self.state.broken, *(stub.model for stub in dead)}, deaths=deaths)

    def _tell_broken(self, broken: Collection[str], **changes: object) -> None:
        """Publish which models have a dead process."""
        reason = f"model processes are being replaced: {', '.join(sorted(broken))}" if broken else ""
        self._tell(is_ready=not broken, reason=reason, broken=tuple(sorted(broken)), **changes)

    def _find_dead(self) -> list[Stub]:
        """Return watched processes that have ended; kill those that are stopped first."""
        now, living = time.monotonic(), list_stubs(self._triton.pid)
        held = {pid for pid in self._watched if pid in living and living[pid].is_stopped}
        self._held = {pid: self._held.get(pid, now) for pid in held}
        for pid, since in self._held.items():
            if now - since >= HELD_SECONDS:
                logger.warning(f"process {pid} of {living[pid].model} is stopped; ending it")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return [stub for pid, stub in self._watched.items() if pid not in living]

    def _replace(self, models: tuple[str, ...]) -> None:
        started = time.monotonic()
        until = started + max(LEAST_REPAIR_SECONDS, REPAIR_STARTS * self._triton.start_seconds)
        try:
            for model in models:
                self._view.renew(model)
                self._load(model, until)
            if not {*self.state.broken} - {*models}:  # else that is asked when the others have been replaced too
                self._check_ensembles(self.state.release_number, until)
        except HangsError:
            # tritonserver can hang after a process died, and then no repair helps.
            seconds = time.monotonic() - started
            logger.warning(f"{', '.join(models)} not replaced in {seconds:.0f} s: tritonserver hangs; ending it")
            self._triton.kill()
            return
        except KvcastError as error:
            self._pause = min(max(1.0, 2 * self._pause), LONGEST_PAUSE_SECONDS)
            self._not_before = time.monotonic() + self._pause
            logger.warning(f"{error}; next try in {self._pause:.0f} s")
            self._tell(reason=f"model processes cannot be replaced: {error}")
            return
        self._pause = 0.0
        logger.info(f"{', '.join(models)} replaced in {time.monotonic() - started:.1f} s")
        # Another model's process can have died meanwhile.
        self._tell_broken({*self.state.broken} - {*models}, repairs=self.state.repairs + 1)

    def _load(self, model: str, until: float = math.inf) -> None:
        """Load a model as the view has it; watch its new processes instead of those that they replace."""
        old = list_stubs(self._triton.pid)
        self._do_watching(lambda: self._admin.load(model), being_loaded=model, until=until)
        shared_memory.hide_regions(self._triton.instance)
        living = list_stubs(self._triton.pid)
        new = {pid: stub for pid, stub in living.items() if stub.model == model and pid not in old}
        wanted = {int(link.name) for link in (self._view.folder / model).iterdir() if link.is_symlink()}
        replaced = {stub.version for stub in new.values()}
        for pid, stub in old.items():
            if stub.model == model and (stub.version in replaced or stub.version not in wanted):
                self._watched.pop(pid, None)
                self._retired.setdefault(pid, time.monotonic())
        self._watched |= new

    def _end_retired(self) -> None:
        if not self._retired:
            return
        living = list_stubs(self._triton.pid)
        for pid, since in list(self._retired.items()):
            if pid not in living:
                del self._retired[pid]
            elif time.monotonic() - since > RETIRED_SECONDS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # -- releases

    def _look_at_record(self) -> tuple[int, int] | None:
        try:
            found = (self._store.repository / RELEASES_FILE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _follow_record(self) -> None:
        """Serve the active release if it is another one."""
        seen = self._look_at_record()
        if seen == self._record_seen or self.state.broken:
            return
        self._record_seen = seen
        try:
            record = self._store.read()
        except KvcastError as error:
            logger.warning(f"{error}; release {self.state.release_number} stays")
            return
        if record.active in (None, self.state.release_number):
            if self.state.refused_release:
                self._tell(refused_release=0, refused_reason="")
            return
        number = record.active or 0
        started = time.monotonic()
        logger.info(f"switching from release {self.state.release_number} to {number}")
        try:
            self._store.check(record.find(str(number)))
            self._switch(number)
        except DiedMeanwhileError as error:
            logger.warning(f"release {number} could not be tried, and will be again: {error}")
            self._record_seen = None
            return
        except KvcastError as error:
            logger.warning(f"release {number} is refused, {self.state.release_number} stays: {error}")
            self._tell(refused_release=number, refused_reason=str(error))
            return
        logger.info(f"release {number} is served, after {time.monotonic() - started:.1f} s")
        release_id = self._read_release_id(number)
        self._tell(release_number=number, release_id=release_id, refused_release=0, refused_reason="")

    def _switch(self, number: int) -> None:
        """Load a release beside the one that is served, try it, switch, unload the old one.

        Raises:
            KvcastError: it cannot be loaded, or its scores are wrong; the old one is still served.
        """
        old = self.state.release_number
        try:
            for model in self._parts:
                self._expose(model, (old, number))
            for ensemble in self._ensembles:
                self._try(ensemble, number)
            for ensemble in self._ensembles:
                self._pin(ensemble, number)
        except Exception:
            self._settle(old)  # if Triton has crashed, its next start loads the old release
            raise
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Load one release alone; if Triton does not respond, its next start finds the view right."""
        for ensemble in self._ensembles:
            with contextlib.suppress(ServerError):
                self._pin(ensemble, number)
        for model in self._parts:
            with contextlib.suppress(ServerError):
                self._expose(model, (number,))

    def _pin(self, ensemble: ModelSpec, number: int) -> None:
        """Load an ensemble with the steps of a release."""
        self._view.pin(ensemble.name, dict.fromkeys(ensemble.steps, number))
        self._admin.load(ensemble.name)

    def _try(self, ensemble: ModelSpec, number: int) -> None:
        """Check an ensemble of a release under a trial name, before callers reach it."""
        trial = ensemble.name + TRIAL_SUFFIX
        self._view.pin(ensemble.name, dict.fromkeys(ensemble.steps, number), trial)
        try:
            self._admin.load(trial)
            self._check_golden(trial, ensemble, number)
        finally:
            with contextlib.suppress(ServerError):
                self._admin.unload(trial)
            self._view.remove(trial)

    def _expose(self, model: str, numbers: tuple[int, ...]) -> None:
        """Load these releases of a model."""
        self._view.link(model, {number: self._store.find_folder(model, number) for number in numbers})
        self._load(model)

    def _read_release_id(self, number: int) -> str:
        return read_manifest(self._store.find_folder(self._parts[0], number)).release

    def _tell(self, **changes: object) -> None:
        self.state = dataclasses.replace(self.state, **changes)  # type: ignore[arg-type]
        self._publish(self.state)

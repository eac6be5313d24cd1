"""Admission control for the whole server: a gate for each model, a bound on bytes, and the launcher's state."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from prometheus_client import Histogram

from kvcast.gateway.config import State
from kvcast.gateway.gate import Gate, GateLimits
from kvcast.protocol.errors import BusyError, TryAgainError
from kvcast.protocol.tensors import MODELS

Reply = TypeVar("Reply")

# Of requests of the usual kilobytes, thousands; of the largest that are taken, eight.
HELD_BYTES = 512 << 20
# Fine where rankings lie, so that a 99th percentile of tens of milliseconds means something.
BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25, 0.4, 0.6, 1, 2, 4, 8, 16, 30)


class Admission:
    """Gates by model, and the state that the launcher last wrote."""

    def __init__(self, limits: GateLimits) -> None:
        """Open a gate before each model."""
        self.seconds = Histogram(
            "kvcast_gateway_request_seconds",
            "From a request's arrival to its answer, of those that Triton answered",
            ["model"],
            registry=None,
            buckets=BUCKETS,
        )
        self.gates = {model.name: Gate(limits, observe=self.seconds.labels(model.name).observe) for model in MODELS}
        self.held_bytes = 0
        self.is_leaving = False  # still answers, but says that it is not ready
        self.state = State()
        self._steps = {model.name: model.steps or (model.name,) for model in MODELS}

    @property
    def broken(self) -> set[str]:
        """The models that cannot answer: those with a dead process, and the ensembles that they are part of."""
        return {name for name, steps in self._steps.items() if set(steps) & set(self.state.broken)}

    def accepts(self, model: str) -> bool:
        """Whether an inference by a model would be let in now; whether there is such a model, Triton says."""
        gate = self.gates.get(model)
        is_closed = gate is not None and gate.is_draining
        return bool(self.state.release_number) and not is_closed and model not in self.broken

    @property
    def is_idle(self) -> bool:
        """Whether no request is inside or waits."""
        return all(gate.is_idle for gate in self.gates.values())

    def follow(self, state: State) -> None:
        """Take in what the launcher says."""
        self.state = state
        for name, gate in self.gates.items():
            gate.is_draining = gate.is_draining or state.is_draining
            gate.set_broken({name} & self.broken, sum(state.deaths.get(step, 0) for step in self._steps[name]))

    def drain(self) -> None:
        """Admit no further requests."""
        for gate in self.gates.values():
            gate.is_draining = True

    def give_up(self) -> None:
        """Refuse the requests that have no answer yet."""
        for gate in self.gates.values():
            gate.give_up()

    def explain_unready(self) -> str:
        """Return why the server is not ready, empty if it is."""
        if self.is_leaving or any(gate.is_draining for gate in self.gates.values()):
            return "the server is stopping"
        return "" if self.state.is_ready else self.state.reason or "the server is starting"

    async def ask(self, model: str, size: int, seconds: float, send: Callable[[float], Awaitable[Reply]]) -> Reply:
        """Send a request through its model's gate; one to a model that is not ours, at once: Triton will refuse it.

        Args:
            model: which model it is for.
            size: bytes of the request, which are held until it is answered.
            seconds: how long its caller waits.
            send: as for `Gate.ask`.

        Raises:
            TryAgainError: there is no server yet.
            BusyError: too much is held already; or as `Gate.ask`.
        """
        if not self.state.release_number:
            raise TryAgainError("the server is starting: try again")
        gate = self.gates.get(model)
        if self.held_bytes + size > HELD_BYTES:
            error = BusyError(f"busy: {self.held_bytes >> 20} MiB of requests are waiting already")
            raise gate.count_refusal("full", error) if gate is not None else error
        held = _Held(self, size)

        async def send_held(left: float) -> Reply:
            with held:
                return await send(left)

        with held:
            return await (gate.ask(model, seconds, send_held) if gate is not None else send_held(seconds))


class _Held:
    """The bytes of a request, counted once as long as its caller waits or Triton has it, whichever is longer."""

    def __init__(self, admission: Admission, size: int) -> None:
        self._admission, self._size, self._holders = admission, size, 0

    def __enter__(self) -> None:
        if not self._holders:
            self._admission.held_bytes += self._size
        self._holders += 1

    def __exit__(self, *_: object) -> None:
        self._holders -= 1
        if not self._holders:
            self._admission.held_bytes -= self._size

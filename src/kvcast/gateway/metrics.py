"""The gateway's own metrics, and Triton's, at one address for Prometheus."""

import asyncio
import shutil
from collections.abc import Iterable

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcast.gateway.admission import Admission
from kvcast.gateway.shadow import Shadow
from kvcast.protocol.tensors import EXPORTED_MODELS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ASK_SECONDS = 5
SHARED_MEMORY = "/dev/shm"  # noqa: S108 where Triton keeps what goes between processes


class GatewayMetrics(Collector):
    """Reads the gates, the shadow and the state when Prometheus asks."""

    def __init__(self, admission: Admission, shadow: Shadow) -> None:
        self._admission, self._shadow = admission, shadow
        self.triton_is_ready = False

    def collect(self) -> Iterable[Metric]:
        """Return what they say now."""
        yield from self._collect_gates()
        yield from self._collect_shadow()
        yield from collect_shared_memory()
        state = self._admission.state
        yield GaugeMetricFamily(
            "kvcast_ready",
            "1 if the server is ready, as a probe would be told",
            value=float(self.triton_is_ready and not self._admission.explain_unready()),
        )
        yield GaugeMetricFamily(
            "kvcast_active_release", "Number of the release that is served", value=state.release_number
        )
        yield GaugeMetricFamily(
            "kvcast_refused_release", "Number of a release that failed its checks, else 0", value=state.refused_release
        )
        yield CounterMetricFamily(
            "kvcast_repairs", "Times that dead model processes were replaced", value=state.repairs
        )
        yield CounterMetricFamily("kvcast_restarts", "Times that tritonserver itself had crashed", value=state.restarts)
        deaths = CounterMetricFamily("kvcast_process_deaths", "Model processes that died or hung", labels=["model"])
        # From the start, at 0: Prometheus sees no increase in what begins with 1.
        for model in (each.name for each in EXPORTED_MODELS):
            deaths.add_metric([model], state.deaths.get(model, 0))
        yield deaths

    def _collect_gates(self) -> Iterable[Metric]:
        answered = CounterMetricFamily("kvcast_gateway_answered", "Requests that Triton answered", labels=["model"])
        refused = CounterMetricFamily(
            "kvcast_gateway_refused", "Requests not let in, by reason", labels=["model", "why"]
        )
        again = CounterMetricFamily("kvcast_gateway_sent_again", "Requests sent again after a death", labels=["model"])
        inside = GaugeMetricFamily("kvcast_gateway_in_flight", "Requests that Triton has", labels=["model"])
        waiting = GaugeMetricFamily("kvcast_gateway_waiting", "Requests that wait for Triton", labels=["model"])
        limit = GaugeMetricFamily("kvcast_gateway_waiting_limit", "Requests that may wait for Triton", labels=["model"])
        for model, gate in self._admission.gates.items():
            limit.add_metric([model], gate.limits.waiting)
            answered.add_metric([model], gate.counts.answered)
            again.add_metric([model], gate.counts.sent_again)
            inside.add_metric([model], gate.in_flight)
            waiting.add_metric([model], gate.waiting)
            for why, count in gate.counts.refused.items():
                refused.add_metric([model, why], count)
        return answered, refused, again, inside, waiting, limit

    def _collect_shadow(self) -> Iterable[Metric]:
        shadow = self._shadow
        outcomes = CounterMetricFamily(
            "kvcast_shadow_requests", "Rankings scored again, by outcome", labels=["outcome"]
        )
        for outcome in ("scored", "skipped", "failed"):
            outcomes.add_metric([outcome], getattr(shadow, outcome))
        largest = GaugeMetricFamily(
            "kvcast_shadow_largest_difference",
            "Largest difference of a score from that of full recomputation since the start; alert above 1e-5",
            value=shadow.largest_difference,
        )
        return outcomes, largest


def collect_shared_memory() -> Iterable[Metric]:
    """Return the size of shared memory and what is left of it; nothing where there is none."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return
    yield GaugeMetricFamily("kvcast_shared_memory_size_bytes", f"Size of {SHARED_MEMORY}", value=usage.total)
    yield GaugeMetricFamily("kvcast_shared_memory_free_bytes", f"What is left of {SHARED_MEMORY}", value=usage.free)


class MetricsPage:
    """Answers Prometheus."""

    def __init__(
        self, admission: Admission, shadow: Shadow, session: aiohttp.ClientSession, upstream: str, health: str
    ) -> None:
        """Register the gateway's metrics.

        Args:
            admission: what it admits.
            shadow: what it scores again.
            session: with which Triton is asked.
            upstream: of its metrics, `http://host:port/metrics`.
            health: of its readiness.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of its own for when a histogram began
        self._registry = CollectorRegistry()
        self._own = GatewayMetrics(admission, shadow)
        self._registry.register(self._own)
        self._registry.register(admission.seconds)
        ProcessCollector(registry=self._registry)  # of the gateway: among others, when it started
        self._session, self._upstream, self._health = session, upstream, health

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return both pages; ours alone where Triton's is not there."""
        if request.path != "/metrics":
            return web.Response(status=404, text="there is /metrics here\n")
        page, health = await asyncio.gather(self._read(self._upstream), self._read(self._health))
        self._own.triton_is_ready = health is not None
        body = (page or b"") + generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _read(self, address: str) -> bytes | None:
        """Return what Triton answers, None if it does not, or not with success."""
        try:
            timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
            async with self._session.get(address, timeout=timeout) as reply:
                return await reply.read() if reply.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

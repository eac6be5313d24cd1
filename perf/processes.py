"""The machine; a server's processes as the system counts them; its metrics."""

import contextlib
import os
import platform
import urllib.request
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvcast.server import TritonServer
from kvcast.server.stubs import list_stubs

PACKAGES = ("kvcast", "onnxruntime", "torch", "numpy", "tritonclient", "nvidia-pytriton")


class Counters:
    """One reading of a server's metrics: `metric` of a model, summed over its instances and other labels."""

    def __init__(self, address: str) -> None:
        """Read the endpoint at `host:port` now."""
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        self._values: dict[tuple[str, str], float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._values[sample.labels.get("model", ""), sample.name] += sample.value

    def get(self, model: str, metric: str) -> float:
        """Return a value, 0 where nothing has been counted."""
        return self._values.get((model, metric), 0.0)


def read_model_memory(server: TritonServer) -> dict[str, int]:
    """Return resident bytes by model: the Python-backend process of each, without shared memory and file pages."""
    found: dict[str, int] = defaultdict(int)
    for stub in list_stubs(server.pid).values():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[stub.model] += read_own_memory(psutil.Process(stub.pid))
    return dict(found)


def read_uses(server: TritonServer) -> dict[str, dict[str, int]]:
    """Return memory, open files and threads of tritonserver, the gateway and each model (of several instances, one)."""
    uses = {}
    for name, process in find_processes(server).items():
        memory = read_own_memory(process)
        uses[name] = {"memory_bytes": memory, "files": process.num_fds(), "threads": process.num_threads()}
    return uses


def read_cpu_seconds(server: TritonServer) -> dict[str, float]:
    """Return the CPU seconds, user and system, that the same processes have taken so far."""
    times = {name: process.cpu_times() for name, process in find_processes(server).items()}
    return {name: time.user + time.system for name, time in times.items()}


def find_processes(server: TritonServer) -> dict[str, psutil.Process]:
    """Return tritonserver, the gateway and the processes of the models (of several instances, one)."""
    pids = {"tritonserver": server.pid, "guard": server.gateway_pid}
    pids |= {stub.model: stub.pid for stub in list_stubs(server.pid).values()}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def read_shared_memory(server: TritonServer) -> int:
    """Return the bytes of the server's regions in shared memory."""
    return sum(512 * region.stat().st_blocks for region in server.list_shared_memory())


def read_own_memory(process: psutil.Process) -> int:
    """Return a process's resident bytes without shared memory and file pages."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def describe_machine(threads: int) -> dict[str, object]:
    """Return the machine, the threads of a session, and the versions."""
    versions = {"python": platform.python_version(), "tritonserver": "2.51.0 (nvidia-pytriton wheel)"}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    processor = {name.strip(): value.strip() for name, _, value in lines}
    wide = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in processor.get("flags", "").split()]
    return {
        "processor": f"{processor.get('model name', '')} ({', '.join(wide)})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "threads_per_session": threads,
        "dtype": "FP32",
        "versions": versions,
    }

"""What every figure has to say of where it was measured: machine, cores, threads, versions, dtype."""

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("kvcast", "onnxruntime", "torch", "numpy", "tritonclient", "nvidia-pytriton")


def describe_machine(threads: int) -> dict[str, object]:
    """Return the machine, the threads of a session, and the versions."""
    versions = {"python": platform.python_version(), "tritonserver": "2.51.0 (nvidia-pytriton wheel)"}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _read_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads_per_session": threads,
        "dtype": "FP32",
        "versions": versions,
    }


def _read_processor() -> str:
    """Return the model name and whether it has the wide instructions that decide fp32 speed."""
    names = {"model name": "", "flags": ""}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            names[key.strip()] = value.strip()
    wide = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in names["flags"].split()]
    return f"{names['model name']} ({', '.join(wide)})"

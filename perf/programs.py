"""Debian's programs that stand around the servers: from the machine, or unpacked by `make setup-deploy`."""

import os
import shutil
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[1] / "build" / "deploy-tools"
PACKAGES = {"haproxy": "haproxy", "prometheus": "prometheus", "promtool": "prometheus", "kubectl": "kubernetes-client"}


def find_program(name: str) -> Path | None:
    """Return where a program is, None if nowhere; what was unpacked comes first."""
    for folder in ("usr/bin", "usr/sbin"):
        if (UNPACKED / folder / name).exists():
            return UNPACKED / folder / name
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Path(found) if found else None


def explain_absence(name: str) -> str:
    """Return what to do about a program that is missing."""
    return f"{name} is not installed: make setup-deploy, or apt-get install {PACKAGES.get(name, name)}"


def make_environment() -> dict[str, str]:
    """Return the environment in which an unpacked program finds its libraries."""
    libraries = UNPACKED / "usr" / "lib" / "x86_64-linux-gnu"
    path = os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]))
    return {**os.environ, "LD_LIBRARY_PATH": path}

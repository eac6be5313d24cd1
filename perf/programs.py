"""Programs around the servers, Debian's and Triton's: from the machine, or unpacked by `make setup-deploy`."""

import os
import shutil
import sys
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[1] / "build" / "deploy-tools"
PACKAGES = {"haproxy": "haproxy", "prometheus": "prometheus", "promtool": "prometheus", "kubectl": "kubernetes-client"}


def find_program(name: str) -> Path | None:
    """Return where a program is, None if nowhere; what was unpacked comes first, then what this Python came with."""
    for folder in ("usr/bin", "usr/sbin"):
        if (UNPACKED / folder / name).exists():
            return UNPACKED / folder / name
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else None


def explain_absence(name: str) -> str:
    """Return the remedy for a missing program."""
    return f"{name} is not installed: make setup-deploy, or apt-get install {PACKAGES.get(name, name)}"


def make_environment() -> dict[str, str]:
    """Return the environment in which an unpacked program finds its libraries."""
    return add_libraries(UNPACKED / "usr" / "lib" / "x86_64-linux-gnu")


def add_libraries(*folders: Path) -> dict[str, str]:
    """Return the environment with more folders in which programs look for libraries."""
    found = dict.fromkeys([*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")])
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, found))}

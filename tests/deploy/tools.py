"""The operators' programs: Debian's haproxy, prometheus and kubectl, from the machine or from `make setup-deploy`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNPACKED = Path(__file__).parents[2] / "build" / "deploy-tools"
PACKAGES = {"haproxy": "haproxy", "prometheus": "prometheus", "promtool": "prometheus", "kubectl": "kubernetes-client"}
# Set by `make test-deploy`: there a program that is missing is a failure.
REQUIRED_VARIABLE = "KVCAST_REQUIRE_DEPLOY_TOOLS"


def find_tool(name: str) -> Path | None:
    """Return where a program is, None if nowhere; what `make setup-deploy` unpacked comes first."""
    for folder in ("usr/bin", "usr/sbin"):
        if (UNPACKED / folder / name).exists():
            return UNPACKED / folder / name
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Path(found) if found else None


def require_tool(name: str) -> Path:
    """Return where a program is; without it the test is skipped, or fails where the programs are required."""
    found = find_tool(name)
    if found is None:
        message = f"{name} is not installed: make setup-deploy, or apt-get install {PACKAGES.get(name, name)}"
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(message)
        pytest.skip(message)
    return found


def make_environment() -> dict[str, str]:
    """Return the environment in which an unpacked program finds its libraries."""
    libraries = UNPACKED / "usr" / "lib" / "x86_64-linux-gnu"
    path = os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]))
    return {**os.environ, "LD_LIBRARY_PATH": path}


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    command = [str(require_tool(name)), *map(str, arguments)]
    return subprocess.run(command, env=make_environment(), capture_output=True, text=True, check=False, timeout=60)

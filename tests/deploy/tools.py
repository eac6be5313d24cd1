"""The operators' programs in tests: skipped where they are missing, unless they are required."""

import os
import subprocess
from pathlib import Path

import pytest

from perf.programs import explain_absence, find_program, make_environment

__all__ = ["make_environment", "require_tool", "run_tool"]

# Set by `make test-deploy`: there a program that is missing is a failure.
REQUIRED_VARIABLE = "KVCAST_REQUIRE_DEPLOY_TOOLS"


def require_tool(name: str) -> Path:
    """Return where a program is; without it the test is skipped, or fails where the programs are required."""
    found = find_program(name)
    if found is None:
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(explain_absence(name))
        pytest.skip(explain_absence(name))
    return found


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    command = [str(require_tool(name)), *map(str, arguments)]
    return subprocess.run(command, env=make_environment(), capture_output=True, text=True, check=False, timeout=60)

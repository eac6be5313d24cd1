"""`python -m tests.audit`: what is installed is what is pinned, and nothing of it has a known vulnerability.

The pins are checked without a network. Vulnerabilities are asked of OSV (osv.dev), one question for all distributions;
where it cannot be reached the answer is "skipped", because neither a network nor somebody's service is a condition for
working on this project. Accepted ones are in `tests/audit-allowlist.txt`, each with a date and a reason.
"""

import datetime
import http.client
import importlib.metadata
import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
ALLOWLIST = Path(__file__).with_name("audit-allowlist.txt")
SERVICE = "https://api.osv.dev/v1/querybatch"
SECONDS = 15
# What makes an environment, and the project itself: no dependencies of anything.
NOT_PINNED = {"pip", "setuptools", "wheel", "kvcast"}
# A service that knows nothing of this one knows nothing.
CANARY = ("jinja2", "2.10")

Versions = dict[str, str]


class AuditError(Exception):
    """Something is wrong; the message says what."""


def normalise(name: str) -> str:
    """Return a distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_constraints(path: Path = CONSTRAINTS) -> Versions:
    """Return the pinned version of each distribution.

    Raises:
        AuditError: a line pins nothing.
    """
    pins = {}
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)", line)
        if found is None:
            raise AuditError(f"{path.name}: expected NAME==VERSION, got {line!r}")
        pins[normalise(found[1])] = found[2]
    return pins


def list_installed() -> Versions:
    """Return the version of each distribution in this environment, without the label of a local build."""
    return {
        normalise(each.metadata["Name"]): each.version.partition("+")[0] for each in importlib.metadata.distributions()
    }


def list_tools(installed: Versions, pins: Versions) -> set[str]:
    """Return what somebody has put into this environment for themselves: not pinned, and nothing here asks for it."""
    asked_for = {
        normalise(found[0])
        for each in importlib.metadata.distributions()
        for requirement in each.requires or []
        if each.metadata["Name"] == "kvcast" or "extra ==" not in requirement  # nobody has asked for others' extras
        if (found := re.match(r"[A-Za-z0-9._-]+", requirement))
    }
    return installed.keys() - pins.keys() - asked_for - NOT_PINNED


def compare(installed: Versions, pins: Versions) -> list[str]:
    """Return a line for each difference between what is installed and what is pinned."""
    names = sorted((installed.keys() | pins.keys()) - NOT_PINNED)
    return [
        f"{name}: {pins.get(name, 'nothing')} is pinned, {installed.get(name, 'nothing')} is installed"
        for name in names
        if installed.get(name) != pins.get(name)
    ]


def read_allowlist(path: Path = ALLOWLIST) -> dict[str, str]:
    """Return why each vulnerability is accepted, by its id.

    Raises:
        AuditError: a line lacks a date or a reason.
    """
    accepted = {}
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(maxsplit=2)
        try:
            identity, date, reason = words
            datetime.date.fromisoformat(date)
        except ValueError as error:
            raise AuditError(f"{path.name}: expected ID YYYY-MM-DD REASON, got {line!r}") from error
        accepted[identity] = reason
    return accepted


def ask(versions: Versions, service: str = SERVICE) -> list[tuple[str, str]] | None:
    """Ask which vulnerabilities are known.

    Returns:
        Name and vulnerability's id of each that is known; None if nobody answers, or nobody who knows.
    """
    packages = [*versions.items(), CANARY]
    queries = [{"version": version, "package": {"name": name, "ecosystem": "PyPI"}} for name, version in packages]
    body = json.dumps({"queries": queries}).encode()
    request = urllib.request.Request(service, body, {"Content-Type": "application/json"})  # noqa: S310 ours, https
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310
            results: list[dict[str, Any]] = json.load(reply)["results"]
        found = [
            (name, str(each["id"]))
            for (name, _), result in zip(packages, results, strict=True)
            for each in result.get("vulns", [])
        ]
        has_canary = bool(results[-1].get("vulns"))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found[: len(found) - len(results[-1]["vulns"])] if has_canary else None


def main(service: str = SERVICE) -> int:
    """Say what is wrong; return the exit status."""
    try:
        pins, accepted = read_constraints(), read_allowlist()
        installed = list_installed()
        tools = list_tools(installed, pins)
    except AuditError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    if tools:
        print(f"audit: nothing asks for {', '.join(sorted(tools))}, which is not looked at")
    installed = {name: version for name, version in installed.items() if name not in tools | NOT_PINNED}
    differences = compare(installed, pins)
    for line in differences:
        print(f"audit: {line}: make setup, or renew constraints.txt", file=sys.stderr)
    known = ask(installed, service)
    if known is None:
        print(f"audit: known vulnerabilities: skipped: no network ({service} cannot be asked)")
        return int(bool(differences))
    refused = [(name, identity) for name, identity in known if identity not in accepted]
    for name, identity in refused:
        print(
            f"audit: {name} {installed[name]}: {identity} (https://osv.dev/{identity}): upgrade, or accept it with a "
            f"reason in tests/{ALLOWLIST.name}",
            file=sys.stderr,
        )
    print(f"audit: {len(installed)} distributions, {len(known)} known vulnerabilities, {len(refused)} not accepted")
    return int(bool(differences or refused))


if __name__ == "__main__":
    sys.exit(main())

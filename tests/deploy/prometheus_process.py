"""Debian's prometheus with the configuration that is shipped, on servers of the test's choice."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from kvcast.server.repository import find_free_ports
from tests.deploy.tools import make_environment, require_tool
from tests.processes import wait_until

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
READY_WITHIN_SECONDS = 20
# Of the scrapes and of the rules, in place of the 15 s that are shipped.
INTERVAL = "1s"


class Prometheus:
    """A running prometheus; a context manager."""

    def __init__(self, folder: Path, targets: Sequence[str], patience: str | None = None) -> None:
        """Copy the configuration, and change the intervals, the targets and, where `patience` is given, every `for`."""
        self.folder = Path(shutil.copytree(SHIPPED, folder / "config"))
        config = yaml.safe_load((self.folder / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), INTERVAL)
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (self.folder / "targets" / "kvcast.yml").write_text(yaml.safe_dump([{"targets": list(targets)}]))
        if patience is not None:
            alerts = self.folder / "rules" / "alerts.yml"
            alerts.write_text(re.sub(r"(?m)^( +)for: \w+$", rf"\1for: {patience}", alerts.read_text()))
        (port,) = find_free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        self._command = [
            str(require_tool("prometheus")),
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--log.level=warn",
        ]

    def __enter__(self) -> Self:
        """Start, and wait until it answers."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=make_environment())
        try:
            wait_until(self._is_ready, READY_WITHIN_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Return the `data` of a reply of the HTTP API."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def query_range(self, expression: str, seconds: float = 10) -> list[dict[str, Any]]:
        """Return the series that an expression had during the last seconds, as a panel asks for them."""
        now = time.time()
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, start=now - seconds, end=now, step=1)[
            "result"
        ]
        return found

    def list_rules(self) -> dict[str, dict[str, Any]]:
        """Return what became of each rule, by its name."""
        return {rule["name"]: rule for group in self.ask("rules")["groups"] for rule in group["rules"]}

    def find_states(self, alert: str) -> set[str]:
        """Return the states of an alert's instances: `pending`, `firing`."""
        return {each["state"] for each in self.list_rules()[alert]["alerts"]}

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=1) as reply:
            return bool(reply.status == 200)
        return False


def read_page(address: str) -> str:
    """Return a server's metrics page."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        text: str = reply.read().decode()
        return text


def find_names(text: str) -> set[str]:
    """Return the names of the series on a page."""
    return set(re.findall(r"(?m)^([a-zA-Z_]\w*)[{ ]", text))


def find_metrics(expression: str) -> set[str]:
    """Return the metrics that a PromQL expression of ours asks for, but for recorded series."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"(?<![\w:])(?:kvcast|nv)_\w+(?![\w:])", bare))


def find_recorded(expression: str) -> set[str]:
    """Return the recorded series that a PromQL expression asks for."""
    return set(re.findall(r"\w+:\w+:\w+", re.sub(r'"[^"]*"', '""', expression)))

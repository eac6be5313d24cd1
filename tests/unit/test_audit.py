"""The audit of dependencies against a service that stands in for the real one."""

import http.server
import json
import threading
from pathlib import Path

import pytest

from tests import audit


class Service(http.server.BaseHTTPRequestHandler):
    """Knows what `known` holds, by name."""

    known: dict[str, list[str]] = {}  # noqa: RUF012 set by the fixture

    def do_POST(self) -> None:
        """Answer a batch of questions."""
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        results = [{"vulns": [{"id": each} for each in self.known.get(q["package"]["name"], [])]} for q in queries]
        body = json.dumps({"results": [result if result["vulns"] else {} for result in results]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def service():
    Service.known = {"jinja2": ["PYSEC-canary"]}
    with http.server.HTTPServer(("127.0.0.1", 0), Service) as own:
        thread = threading.Thread(target=own.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{own.server_port}"
        own.shutdown()
        thread.join()


@pytest.fixture
def allowlist(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "allowlist.txt"
    path.write_text("# none\n")
    monkeypatch.setattr(audit.read_allowlist, "__defaults__", (path,))
    return path


@pytest.fixture
def installed(monkeypatch):
    versions = {"numpy": "1.26.4", "kvcast": "0.1.0"}
    monkeypatch.setattr(audit, "list_installed", lambda: versions)
    monkeypatch.setattr(audit, "read_constraints", lambda: {"numpy": "1.26.4"})
    return versions


@pytest.mark.usefixtures("installed", "allowlist")
def test_nothing_known_is_a_success(service, capsys):
    assert audit.main(service) == 0
    assert "0 known vulnerabilities" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_a_known_vulnerability_fails_unless_it_is_accepted(service, allowlist, capsys):
    Service.known["numpy"] = ["GHSA-1", "GHSA-2"]
    allowlist.write_text("GHSA-1 2026-11-22 only in f2py, which nothing here runs\n")
    assert audit.main(service) == 1
    errors = capsys.readouterr().err
    assert "numpy 1.26.4: GHSA-2" in errors
    assert "GHSA-1" not in errors
    allowlist.write_text("GHSA-1 2026-11-22 a reason\nGHSA-2 2026-11-22 another\n")
    assert audit.main(service) == 0


@pytest.mark.usefixtures("installed", "allowlist")
def test_without_a_network_it_is_skipped_and_says_so(capsys):
    assert audit.main("http://127.0.0.1:1") == 0
    assert "skipped: no network" in capsys.readouterr().out


@pytest.mark.usefixtures("installed", "allowlist")
def test_a_service_that_knows_nothing_is_not_believed(service, capsys):
    Service.known = {}
    assert audit.main(service) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_tool_that_nothing_asks_for_is_named_and_no_more(installed, allowlist, capsys):
    installed["somebodys-own-tool"] = "1.0"
    assert audit.main("http://127.0.0.1:1") == 0
    assert "nothing asks for somebodys-own-tool" in capsys.readouterr().out


@pytest.mark.usefixtures("allowlist")
def test_what_is_not_pinned_fails_without_a_network_too(installed, capsys):
    installed["protobuf"] = "1.0"
    installed["numpy"] = "1.26.5"
    assert audit.main("http://127.0.0.1:1") == 1
    errors = capsys.readouterr().err
    assert "protobuf: nothing is pinned, 1.0 is installed" in errors
    assert "numpy: 1.26.4 is pinned, 1.26.5 is installed" in errors


def test_a_constraint_that_pins_nothing_is_refused(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("numpy>=1\n")
    with pytest.raises(audit.AuditError, match="NAME==VERSION"):
        audit.read_constraints(path)


@pytest.mark.parametrize("line", ["GHSA-1", "GHSA-1 2026-11-22", "GHSA-1 yesterday because"])
def test_an_accepted_vulnerability_needs_a_date_and_a_reason(tmp_path, line):
    path = tmp_path / "allowlist.txt"
    path.write_text(line + "\n")
    with pytest.raises(audit.AuditError, match="ID YYYY-MM-DD REASON"):
        audit.read_allowlist(path)

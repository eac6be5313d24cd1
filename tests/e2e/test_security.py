"""What SECURITY.md says: TLS with real certificates, files that only their owner reads, a repository only read."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcast.client import NO_RETRIES, AddressError, RankerClient, TlsOptions
from kvcast.client.__main__ import main as rank
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.manifest import hash_file
from kvcast.server import TritonServer
from kvcast.server.stubs import list_stubs
from tests.conftest import make_settings
from tests.processes import find_children, list_shared_memory, read_until, wait_until
from tests.support import TOLERANCE, draw_request, find_free_ports

EXAMPLE = draw_request(load_config("tiny"), 20, 5, seed=1)
REPAIRED_WITHIN_SECONDS = 30
NOBODY = 65534
# How root starts somebody for whom "read-only" means something. The second owns the files, which are read-only.
USERS = {
    "our own": [],
    "nobody's": ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--bounding-set=-all"],
    "powerless root's": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
}
REACHES_PYTHON = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import kvcast.server'], check=True)"


class Certificates:
    """Two authorities that do not know of each other, and what they have signed, made with the openssl command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for authority in ("ours", "theirs"):
            self._run(
                *("req", "-x509", "-days", "2", "-subj", f"/CN=authority {authority}", "-keyout", f"{authority}.key"),
                *("-out", f"{authority}.pem", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
                *self._new_key,
            )
        self.sign("server", "ours", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self.sign("elsewhere", "ours", "subjectAltName=DNS:elsewhere.example")
        self.sign("caller", "ours", "extendedKeyUsage=clientAuth")
        self.sign("stranger", "theirs", "extendedKeyUsage=clientAuth")

    _new_key = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")

    def sign(self, name: str, authority: str, extension: str) -> None:
        self._run("req", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr", *self._new_key)
        (self.folder / "extension").write_text(extension + "\n")
        self._run(
            *("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "extension"),
            *("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"),
        )

    def __getitem__(self, name: str) -> Path:
        """Return where a file lies."""
        return self.folder / name

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    return Certificates(tmp_path_factory.mktemp("certificates"))


def serve_with(certificates: Certificates, repository: Path, **settings) -> TritonServer:
    return TritonServer(
        dataclasses.replace(
            make_settings(repository),
            models=["ranker"],
            tls_certificate=certificates["server.pem"],
            tls_key=certificates["server.key"],
            **settings,
        )
    )


@pytest.fixture(scope="module")
def encrypted(certificates, tiny_repository) -> Iterator[TritonServer]:
    with serve_with(certificates, tiny_repository) as own:
        yield own


@pytest.fixture(scope="module")
def mutual(certificates, tiny_repository) -> Iterator[TritonServer]:
    with serve_with(certificates, tiny_repository, tls_client_ca=certificates["ours.pem"]) as own:
        yield own


def ask_grpc(server: TritonServer, tls: TlsOptions | None) -> np.ndarray:
    with RankerClient(server.grpc_address, tls=tls, retry=NO_RETRIES, deadline=5) as client:
        return client.rank(*EXAMPLE).scores


def trust(certificates: Certificates, authority: str, caller: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates[f"{authority}.pem"])
    if caller is not None:
        context.load_cert_chain(certificates[f"{caller}.pem"], certificates[f"{caller}.key"])
    return context


def ask_https(server: TritonServer, context: ssl.SSLContext) -> np.ndarray:
    inputs = [
        {"name": name, "shape": [1, *ids.shape], "datatype": "INT64", "data": ids.reshape(-1).tolist()}
        for name, ids in zip(("history", "candidates"), EXAMPLE, strict=True)
    ]
    connection = http.client.HTTPSConnection(server.http_address, context=context, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", "/v2/models/ranker/infer", json.dumps({"inputs": inputs}))
        response = connection.getresponse()
        reply = json.load(response)
        assert response.status == 200, reply
    return np.array(next(each["data"] for each in reply["outputs"] if each["name"] == "scores"))


@pytest.fixture(scope="module")
def right(server) -> np.ndarray:
    return ask_grpc(server, None)


def test_both_protocols_answer_over_tls(encrypted, certificates, right):
    np.testing.assert_allclose(ask_grpc(encrypted, TlsOptions(certificates["ours.pem"])), right, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ask_https(encrypted, trust(certificates, "ours")), right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_ranks_over_tls_and_says_what_is_wrong(
    server, encrypted, mutual, certificates, right, protocol, monkeypatch
):
    def ask(server: TritonServer, tls: TlsOptions | None, port_of: str = protocol) -> np.ndarray:
        address = {"grpc": server.grpc_address, "http": server.http_address}[port_of]
        with RankerClient(address, protocol=protocol, tls=tls, deadline=20) as client:
            return client.rank(*EXAMPLE).scores

    ours, other = certificates["ours.pem"], {"grpc": "http", "http": "grpc"}[protocol]
    own = TlsOptions(ours, certificates["caller.pem"], certificates["caller.key"])
    for each, tls in ((encrypted, TlsOptions(ours)), (mutual, own)):
        np.testing.assert_allclose(ask(each, tls), right, rtol=0, atol=TOLERANCE)
    for each, tls, words in (
        (encrypted, None, "expects TLS: give tls="),
        (encrypted, TlsOptions(certificates["theirs.pem"]), r"no TLS \(.*certificate"),
        (encrypted, TlsOptions(), r"no TLS \(.*certificate"),
        (mutual, TlsOptions(ours), r"(no TLS \(.*CERTIFICATE_REQUIRED\)|hangs up after the TLS handshake)"),
        (server, TlsOptions(ours), r"no TLS \(WRONG_VERSION_NUMBER\)"),
    ):
        with pytest.raises(AddressError, match=words):
            ask(each, tls)
    with pytest.raises(AddressError, match="this port does not speak"):
        ask(encrypted, TlsOptions(ours), other)
    if protocol == "http":
        monkeypatch.setenv("SSL_CERT_FILE", str(ours))
        with RankerClient(f"https://{encrypted.http_address}", protocol="http") as client:
            np.testing.assert_allclose(client.rank(*EXAMPLE).scores, right, rtol=0, atol=TOLERANCE)


def test_the_command_line_ranks_over_tls(encrypted, certificates, tmp_path, capsys):
    config = load_config("tiny")
    names = [
        [field.name for field in fields] for fields in (config.schema.history_fields, config.schema.candidate_fields)
    ]
    rows = [
        [dict(zip(fields, map(int, row), strict=True)) for row in ids]
        for fields, ids in zip(names, EXAMPLE, strict=True)
    ]
    (tmp_path / "request.json").write_text(json.dumps(dict(zip(("history", "candidates"), rows, strict=True))))
    arguments = [str(tmp_path / "request.json"), "--json", "--address", encrypted.grpc_address, "--retry", "0"]
    assert rank([*arguments, "--tls-ca", str(certificates["ours.pem"])]) == 0
    assert len(json.loads(capsys.readouterr().out)["scores"]) == len(EXAMPLE[1])
    assert rank([*arguments, "--tls-ca", str(certificates["theirs.pem"]), "--deadline", "3"]) == 2
    arguments += ["--protocol", "http", "--address", encrypted.http_address]
    assert rank([*arguments, "--tls-ca", str(certificates["ours.pem"])]) == 0


def test_a_caller_who_trusts_somebody_else_gets_no_scores(encrypted, certificates):
    for tls in (TlsOptions(certificates["theirs.pem"]), TlsOptions()):
        with pytest.raises(KvcastError):
            ask_grpc(encrypted, tls)
    with pytest.raises(ssl.SSLCertVerificationError):
        ask_https(encrypted, trust(certificates, "theirs"))


def test_a_certificate_of_another_host_is_refused_by_callers(certificates, tiny_repository):
    settings = dataclasses.replace(
        make_settings(tiny_repository),
        models=["ranker_resident"],
        tls_certificate=certificates["elsewhere.pem"],
        tls_key=certificates["elsewhere.key"],
    )
    with TritonServer(settings) as server:
        with pytest.raises(KvcastError):
            ask_grpc(server, TlsOptions(certificates["ours.pem"]))
        with pytest.raises(ssl.SSLCertVerificationError):
            ask_https(server, trust(certificates, "ours"))


def test_nobody_is_answered_in_the_clear(encrypted):
    with pytest.raises(KvcastError):
        ask_grpc(encrypted, None)
    connection = http.client.HTTPConnection(encrypted.http_address, timeout=5)
    connection.request("GET", "/v2/health/ready")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        connection.getresponse()
    connection.close()


def test_old_versions_of_tls_are_refused(encrypted, certificates):
    for address in (encrypted.http_address, encrypted.grpc_address):
        command = ["openssl", "s_client", "-connect", address, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
        done = subprocess.run(command, input=b"", capture_output=True, check=False, timeout=20)
        assert done.returncode != 0, address


def test_with_a_client_authority_only_its_callers_are_answered(mutual, certificates, right):
    ours = certificates["ours.pem"]
    own = TlsOptions(ours, certificates["caller.pem"], certificates["caller.key"])
    np.testing.assert_allclose(ask_grpc(mutual, own), right, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ask_https(mutual, trust(certificates, "ours", "caller")), right, rtol=0, atol=TOLERANCE)
    for tls in (TlsOptions(ours), TlsOptions(ours, certificates["stranger.pem"], certificates["stranger.key"]), None):
        with pytest.raises(KvcastError):
            ask_grpc(mutual, tls)
    for caller in (None, "stranger"):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ask_https(mutual, trust(certificates, "ours", caller))


def test_a_caller_who_stays_in_the_handshake_keeps_nobody_out(encrypted, certificates, right):
    import socket  # noqa: PLC0415

    host, _, port = encrypted.http_address.partition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(50)]
    np.testing.assert_allclose(ask_https(encrypted, trust(certificates, "ours")), right, rtol=0, atol=TOLERANCE)
    for each in silent:
        each.close()


def test_only_its_owner_reads_the_admin_key_and_what_is_beside_it(server):
    folder = server.admin_key_file.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.admin_key_file.stat().st_mode) == 0o600
    assert folder.stat().st_uid == os.getuid()


def test_tritons_own_http_port_asks_for_a_key_before_it_infers(server):
    ports = [int(flag.partition("=")[2]) for flag in read_command(server.pid) if flag.startswith("--http-port=")]
    connection = http.client.HTTPConnection("127.0.0.1", ports[0])
    connection.request("POST", "/v2/models/ranker/infer", "{}")
    assert connection.getresponse().status == 403
    connection.close()


def read_command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return mode, time of the last change and hash of everything in a folder, itself included."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            hash_file(path) if path.is_file() else "",
        )
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def read_only_repository(tiny_repository) -> Iterator[Path]:
    """A repository that everybody may read and nobody may write, at a place that everybody may reach."""
    with tempfile.TemporaryDirectory(prefix="kvcast-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        repository = Path(shutil.copytree(tiny_repository, folder / "repository"))
        for path in (*repository.rglob("*"), repository):
            path.chmod(0o444 if path.is_file() else 0o555)
        yield repository
        for path in (repository, *repository.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.parametrize("whose", USERS)
def test_the_repository_is_not_written_by_a_start_requests_a_repair_and_a_stop(read_only_repository, whose):
    prefix = USERS[whose]
    if prefix:
        if os.getuid() != 0 or shutil.which("setpriv") is None:
            pytest.skip("only root, with setpriv, can start a server as another user")
        tried = subprocess.run([*prefix, sys.executable, "-c", REACHES_PYTHON], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip(f"{whose} processes cannot reach {sys.executable}")
    before, regions = snapshot(read_only_repository), list_shared_memory()
    ports = find_free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    command = [*prefix, sys.executable, "-m", "kvcast.server", "--repository", str(read_only_repository), *flags]
    models = ["--models", "ranker ranker_resident ranker_full"]
    with subprocess.Popen([*command, *models], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            read_until(process, "Ctrl-C")
            with RankerClient(f"127.0.0.1:{ports[1]}") as client:
                answer = client.rank(*EXAMPLE).scores
                triton = next(pid for pid in find_children(process.pid) if list_stubs(pid))
                if prefix:
                    status = Path(f"/proc/{triton}/status").read_text()
                    assert re.search(r"CapEff:\s+0+$", status, re.MULTILINE), "it may not do more than others"
                for pid in list_stubs(triton):
                    os.kill(pid, signal.SIGKILL)
                wait_until(lambda: len(list_stubs(triton)) == 4, REPAIRED_WITHIN_SECONDS)
                np.testing.assert_allclose(client.rank(*EXAMPLE).scores, answer, rtol=0, atol=TOLERANCE)
            assert snapshot(read_only_repository) == before
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    assert process.returncode == 0
    assert snapshot(read_only_repository) == before
    assert list_shared_memory() <= regions


def test_other_users_of_the_machine_cannot_read_requests_in_shared_memory(server):
    flag = next(flag for flag in read_command(server.pid) if "shm-region-prefix-name" in flag)
    own = [
        path
        for path in list_shared_memory()
        if path.name.startswith(flag.rpartition("=")[2]) and "owner" not in path.name
    ]
    assert len(own) == 4
    assert not [path for path in own if stat.S_IMODE(path.stat().st_mode) & 0o077]

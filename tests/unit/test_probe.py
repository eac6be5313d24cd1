"""The probe without a server: what each answer comes to, in words and exit status."""

import json
import threading
import time

import numpy as np
import pytest

from kvcast.client import (
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    RankerClient,
    ServerFaultError,
    TryAgainError,
)
from kvcast.client import probe as probing
from kvcast.client.probe import Finding, Health, Probe, main, make_rows, rank_canary
from kvcast.client.retry import NO_RETRIES, Deadline
from kvcast.client.transport import Call, Tensors, Transport
from kvcast.protocol.manifest import Manifest, read_manifest
from kvcast.protocol.schema import Field
from tests.support import find_free_ports

ADDRESS = "here:1"


class FakeServer(Transport):
    """Scores a candidate by its item, if nothing else is asked of it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.error: Exception | None = None
        self.shift_of_many = 0.0
        self.nan = False

    def infer(self, call: Call, deadline: float) -> Tensors:
        if call.outputs == ["manifest"]:
            return {"manifest": np.array([[self.manifest.to_json().encode()]], object)}
        if self.error is not None:
            raise self.error
        scores = call.inputs["candidates"][:, :, 0].astype(np.float32)
        if scores.shape[1] > 1:
            scores += np.float32(self.shift_of_many)
        return {"scores": scores * np.float32("nan") if self.nan else scores}

    def close(self) -> None:
        pass


@pytest.fixture
def fake(tiny_repository, monkeypatch) -> FakeServer:
    """The server that every new gRPC client talks to."""
    server = FakeServer(read_manifest(tiny_repository / "user_encoder" / "1"))

    monkeypatch.setattr("kvcast.client.clients.open_transport", lambda *_: server)
    return server


def test_ready_is_one_line_and_exit_status_0(fake, capsys):
    assert main(["--address", ADDRESS]) == 0
    release = fake.manifest.release[:12]
    assert capsys.readouterr().out.startswith(f"ready: ranker at here:1 (grpc), release {release}, ")
    assert main(["--address", ADDRESS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("milliseconds") >= 0
    assert printed == {
        "health": "ready",
        "ok": True,
        "server": ADDRESS,
        "protocol": "grpc",
        "model": "ranker",
        "release": fake.manifest.release,
        "why": None,
    }


@pytest.mark.parametrize(
    ("error", "status", "live_status", "line"),
    [
        (
            TryAgainError("here:1: Stub process 'user_encoder_0_0' is not healthy."),
            3,
            3,
            "not ready: ranker at here:1 (grpc): Stub process 'user_encoder_0_0' is not healthy.",
        ),
        (
            BusyError("here:1: busy: 9 requests are waiting already"),
            3,
            0,
            "not ready: ranker at here:1 (grpc): busy: 9 requests are waiting already: send fewer",
        ),
        (
            DeadlineExceededError("here:1: no answer within the deadline of 1.87 s"),
            3,
            3,
            "not ready: ranker at here:1 (grpc): no answer within 2 s",
        ),
        (ServerFaultError("here:1: release: …"), 4, 4, "broken: ranker at here:1 (grpc): release: …: see the server's"),
        (InvalidRequestError("history: …"), 4, 4, "broken: ranker at here:1 (grpc): history: …: see the server's log"),
    ],
)
def test_what_an_error_comes_to(fake, capsys, error, status, live_status, line):
    fake.error = error
    assert main(["--address", ADDRESS]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert main(["--address", ADDRESS, "--live"]) == live_status
    said = capsys.readouterr()
    assert (said.out if live_status == 0 else said.err).startswith(
        {0: "live, busy: ", 3: "not live: ", 4: "broken: "}[live_status]
    )
    assert main(["--address", ADDRESS, "--json"]) == status
    table = json.loads(capsys.readouterr().out)
    assert table["ok"] is False
    assert table["release"] is None
    assert table["why"] in line or table["why"].startswith(("busy", "no answer"))


def test_scores_that_are_not_numbers_are_broken(fake, capsys):
    fake.nan = True
    assert main(["--address", ADDRESS]) == 4
    assert "finite numbers" in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "health"), [(5e-6, Health.READY), (1e-4, Health.BROKEN)])
def test_scores_alone_and_together_must_agree(fake, shift, health):
    # Scores are below 10, where fp32 tells such shifts apart.
    fake.shift_of_many = shift
    finding = Probe(ADDRESS).run()
    assert finding.health is health
    if health is Health.BROKEN:
        assert "expected candidate 0 to score the same alone and among others" in finding.why


def test_rows_are_within_their_vocabularies():
    fields = (Field("item", 500), Field("flag", 2), Field("nothing", 1), Field("few", 4))
    rows = make_rows(fields, 3)
    assert rows.shape == (3, 4)
    assert rows.dtype == np.int64
    assert (rows < [field.vocab_size for field in fields]).all()
    assert (rows[:, [0, 1, 3]] >= 1).all()
    assert rows[0, 0] == 1
    assert len(set(rows[:, 0].tolist())) == 3


def test_one_probe_has_one_deadline(fake):
    with RankerClient(ADDRESS, retry=NO_RETRIES) as client:
        deadline = Deadline(1.0, clock=iter(np.arange(0, 100, 0.3)).__next__)
        given: list[float] = []
        infer = fake.infer

        def note(call: Call, seconds: float) -> Tensors:
            given.append(seconds)
            return infer(call, seconds)

        fake.infer = note  # type: ignore[method-assign]
        rank_canary(client, deadline)
    np.testing.assert_allclose(given, [0.7, 0.4, 0.1, 0.001], atol=0.05)


def test_waiting_ends_when_the_server_is_ready(fake):
    fake.error = TryAgainError("away")
    timer = threading.Timer(0.4, lambda: setattr(fake, "error", None))
    timer.start()
    started = time.monotonic()
    assert Probe(ADDRESS).run_until_ready(20).health is Health.READY
    assert 0.4 <= time.monotonic() - started < 5
    timer.join()


def test_waiting_ends_when_the_time_is_over(fake):
    fake.error = BusyError("busy")
    started = time.monotonic()
    assert Probe(ADDRESS).run_until_ready(0.6).health is Health.BUSY
    assert time.monotonic() - started < 2
    assert Probe(ADDRESS).run_until_ready(20, live=True).health is Health.BUSY


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_nobody_there(capsys, protocol):
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    assert main(["--address", address, "--protocol", protocol]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"not ready: ranker at {address} ({protocol}): no server (")
    assert error.endswith(": is it up, and is this its address and port?\n")
    assert main(["--address", address, "--protocol", protocol, "--live"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--deadline", "0"], "deadline: expected a positive number"),
        (["--tls-ca", "missing.pem"], "tls: expected ca_file to be a file"),
        (["--tls-ca", __file__, "--protocol", "http"], "tls: expected PEM files"),
        (["--address", "here"], "address: expected host:port"),
    ],
)
def test_wrong_arguments(capsys, arguments, words):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_liveness_is_patient(monkeypatch):
    seen: list[float] = []

    def note(probe: Probe) -> Finding:
        seen.append(probe.deadline)
        return Finding(Health.READY)

    monkeypatch.setattr(Probe, "run", note)
    for arguments in ([], ["--live"], ["--live", "--deadline", "4"]):
        assert main(arguments) == 0
    assert seen == [probing.READY_DEADLINE, probing.LIVE_DEADLINE, 4.0]

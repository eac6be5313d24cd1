"""`kvcast probe`: health that tells the truth.

A server can say that it is ready while no request comes through: Triton's own endpoints answer 200 when the process of
a Python model is dead. A probe ranks: two candidates together, then each alone, which must come to the same scores.
It ranks once, without sending again, over a new connection, as a new caller would.
"""

import argparse
import enum
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcast.client.__main__ import (
    SERVER_FAULT,
    TRY_AGAIN,
    WRONG_REQUEST,
    add_connection_options,
    read_connection_options,
)
from kvcast.client.address import Protocol, TlsOptions
from kvcast.client.clients import DEFAULT_ADDRESSES, RankerClient
from kvcast.client.ranking import Ranking
from kvcast.client.retry import NO_RETRIES, Deadline
from kvcast.protocol.errors import (
    AddressError,
    BusyError,
    DeadlineExceededError,
    ExpiredError,
    KvcastError,
    NoServerError,
    ServerFaultError,
    TryAgainError,
)
from kvcast.protocol.manifest import Manifest
from kvcast.protocol.schema import Field
from kvcast.protocol.tensors import RANKER, SCORE_TOLERANCE

# Readiness is checked within seconds. Liveness is patient: restarting an overloaded server makes it worse.
READY_DEADLINE, LIVE_DEADLINE = 2.0, 10.0
# Seconds between the probes of --wait.
WAIT_STEP = 0.25
# The canary: as many events and candidates, if the server's limits allow.
EVENTS, CANDIDATES = 3, 2

DESCRIPTION = """\
Say whether a server ranks: ask for its manifest, rank a small request of known shape, and check the scores. Where
Triton's own endpoints say that it is ready, this shows that it is.
"""
EXAMPLE = """\
exit status:
  0  ready (with --live: ready, or busy)
  2  the arguments are wrong
  3  not ready: the server is away or too busy, a model is being replaced, or its process is dead
  4  broken: the model is not served, or its answers are wrong; the operator has to act

for Kubernetes, in the container of the server:
  readinessProbe:
    exec: {command: [kvcast, probe, --address, "127.0.0.1:8001"]}
    periodSeconds: 5
    timeoutSeconds: 5
  livenessProbe:
    exec: {command: [kvcast, probe, --live, --address, "127.0.0.1:8001"]}
    periodSeconds: 20
    timeoutSeconds: 15
    failureThreshold: 3
  startupProbe:
    exec: {command: [kvcast, probe, --address, "127.0.0.1:8001"]}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 120

Starting the command takes about a second more than the deadline: timeoutSeconds is longer by that. The canary waits in
the server's queue like any request, and silence for the whole deadline is no sign of life: let the deadline of a
liveness probe be longer than it takes to work off a full queue (`kvcast serve --waiting`).
"""


class Health(enum.Enum):
    """What a probe found."""

    READY = "ready"
    BUSY = "busy"
    NOT_READY = "not ready"
    BROKEN = "broken"

    def to_status(self, *, live: bool) -> int:
        """Return the exit status; `live`: busy is well."""
        if self is Health.READY or (live and self is Health.BUSY):
            return 0
        return SERVER_FAULT if self is Health.BROKEN else TRY_AGAIN


@dataclass(frozen=True)
class Finding:
    """What a probe found: `why` it is not ready, else the release (hex) and the milliseconds of the canary ranking."""

    health: Health
    why: str = ""
    release: str = ""
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Probe:
    """What to probe; `deadline` is for the whole of one probe, in seconds.

    Raises:
        ValueError: by `run`, if it cannot be: an unknown protocol, a deadline that is not positive.
        AddressError: by `run`, if the address is that of another protocol, or of other TLS.
    """

    address: str
    protocol: Protocol = "grpc"
    model: str = RANKER.name
    deadline: float = READY_DEADLINE
    tls: TlsOptions | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> Finding:
        """Probe once."""
        client = RankerClient(
            self.address,
            protocol=self.protocol,
            model=self.model,
            deadline=self.deadline,
            retry=NO_RETRIES,
            tls=self.tls,
            headers=self.headers,
        )
        with client:
            try:
                manifest, ranking = rank_canary(client, Deadline(self.deadline))
            except KvcastError as error:
                if isinstance(error, AddressError) and not isinstance(error, NoServerError):
                    raise
                return self._judge(error)
        return Finding(Health.READY, "", manifest.release, 1e3 * ranking.seconds)

    def _judge(self, error: KvcastError) -> Finding:
        # The line names the server already; and what was left of the deadline at the end says nothing.
        why = str(error).removeprefix(f"{self.address}: ")
        if isinstance(error, BusyError | ExpiredError):
            return Finding(Health.BUSY, why)
        if isinstance(error, DeadlineExceededError):
            return Finding(Health.NOT_READY, f"no answer within {self.deadline:g} s")
        return Finding(Health.NOT_READY if isinstance(error, TryAgainError) else Health.BROKEN, why)

    def run_until_ready(self, seconds: float, *, live: bool = False) -> Finding:
        """Probe until it succeeds or this time is over; return the last finding.

        Args:
            seconds: after which no further probe begins; 0 is one probe.
            live: busy is success too.
        """
        whole = Deadline(seconds)
        while True:
            finding = self.run()
            if finding.health.to_status(live=live) == 0 or whole.left <= WAIT_STEP:
                return finding
            time.sleep(WAIT_STEP)

    def describe(self, finding: Finding, *, live: bool = False) -> str:
        """Return the finding in one line, with what to do."""
        where = f"{self.model} at {self.address} ({self.protocol})"
        if finding.health is Health.READY:
            return f"ready: {where}, release {finding.release[:12]}, {finding.milliseconds:.1f} ms"
        if finding.health is Health.BUSY:
            word = "live, busy" if live else "not ready"
            return f"{word}: {where}: {finding.why}: send fewer requests, or add servers"
        if finding.health is Health.NOT_READY:
            return f"{'not live' if live else 'not ready'}: {where}: {finding.why}"
        return f"broken: {where}: {finding.why}: see the server's log; export and load the model again"

    def to_json(self, finding: Finding, *, live: bool = False) -> str:
        """Return the finding for machines."""
        table = {
            "health": finding.health.value,
            "ok": finding.health.to_status(live=live) == 0,
            "server": self.address,
            "protocol": self.protocol,
            "model": self.model,
            "release": finding.release or None,
            "milliseconds": finding.milliseconds if finding.health is Health.READY else None,
            "why": finding.why or None,
        }
        return json.dumps(table)


def rank_canary(client: RankerClient, deadline: Deadline) -> tuple[Manifest, Ranking]:
    """Rank the canary on a client; return what the server serves, and the ranking of all candidates together.

    Raises:
        TryAgainError: the server is away or busy, or the deadline has passed.
        ServerFaultError: it does not answer as it should.
        InvalidRequestError: it refuses a request that its own manifest allows.
    """
    manifest = client.get_manifest(deadline=_remaining(deadline))
    history = make_rows(manifest.history_fields, min(EVENTS, manifest.limits.history))
    candidates = make_rows(manifest.candidate_fields, min(CANDIDATES, manifest.limits.candidates))
    together = client.rank(history, candidates, deadline=_remaining(deadline))
    for index, candidate in enumerate(candidates):
        alone = client.rank(history, candidate[None], deadline=_remaining(deadline)).scores[0]
        difference = abs(float(alone - together.scores[index]))
        if difference > SCORE_TOLERANCE:
            raise ServerFaultError(
                f"scores: expected candidate {index} to score the same alone and among others, "
                f"got a difference of {difference:.2g}"
            )
    return manifest, together


def make_rows(fields: tuple[Field, ...], count: int) -> npt.NDArray[np.int64]:
    """Return `[count, fields]`: ids from 1 up, all within their vocabularies and, if those allow, all different."""
    steps = np.arange(count * len(fields), dtype=np.int64).reshape(count, len(fields))
    # A vocabulary of one id has only the unknown.
    known = np.array([max(1, field.vocab_size - 1) for field in fields])
    highest = np.array([field.vocab_size - 1 for field in fields])
    return np.minimum(1 + steps % known, highest)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast probe",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--address", metavar="HOST:PORT", help="(this machine, port 8001 for gRPC, 8000 for HTTP)")
    parser.add_argument("--model", default=RANKER.name, help="model to rank with (%(default)s)")
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help=f"for one probe as a whole ({READY_DEADLINE:g}; with --live {LIVE_DEADLINE:g})",
    )
    parser.add_argument(
        "--live", action="store_true", help="say whether it lives: a server that refuses because it is busy does"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="probe again for so long until it succeeds (once)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Probe; return the exit status."""
    arguments = make_parser().parse_args(argv)
    deadline = arguments.deadline
    if deadline is None:
        deadline = LIVE_DEADLINE if arguments.live else READY_DEADLINE
    try:
        tls, headers = read_connection_options(arguments)
        probe = Probe(
            address=arguments.address or DEFAULT_ADDRESSES[arguments.protocol],
            protocol=arguments.protocol,
            model=arguments.model,
            deadline=deadline,
            tls=tls,
            headers=headers,
        )
        finding = probe.run_until_ready(arguments.wait, live=arguments.live)
    except (ValueError, AddressError) as error:
        print(f"kvcast probe: {error}", file=sys.stderr)
        return WRONG_REQUEST
    say = probe.to_json if arguments.json else probe.describe
    status = finding.health.to_status(live=arguments.live)
    print(say(finding, live=arguments.live), file=sys.stdout if status == 0 or arguments.json else sys.stderr)
    return status


def _remaining(deadline: Deadline) -> float:
    # A call wants a positive number; one that is all but over fails by itself.
    return max(deadline.left, 1e-3)


if __name__ == "__main__":
    sys.exit(main())

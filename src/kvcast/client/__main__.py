"""`kvcast rank`: rank the candidates of a JSON request on a running server."""

import argparse
import json
import sys
from pathlib import Path

from kvcast.client.address import TlsOptions
from kvcast.client.clients import DEFAULT_ADDRESSES, DEFAULT_DEADLINE, RankerClient
from kvcast.client.ranking import Ranking
from kvcast.client.retry import RetryPolicy
from kvcast.protocol.errors import AddressError, InvalidRequestError, KvcastError, TryAgainError
from kvcast.protocol.manifest import Manifest
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import RANKER

# Long enough for a model to be replaced, short enough not to look stuck.
RETRY_SECONDS = 3.0
# Exit statuses, by who has to act; 0 is a ranking and 1 is left to Python.
WRONG_REQUEST, TRY_AGAIN, SERVER_FAULT = 2, 3, 4

EXAMPLE = """\
example request:
  {"history": [{"item": 690, "category": 8, "price_bucket": 49, "action": 2}],
   "candidates": [{"item": 673, "category": 19, "brand": 85, "price_bucket": 31}]}

exit status: 0 ranked, 2 the request or the address is wrong, 3 try again later, 4 the server is broken
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast rank",
        description="Rank the candidates of a request on a running server. Fields and vocabularies are the served "
        "model's; the history is oldest event first.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("request", metavar="REQUEST.json", help="path of the request, or - for standard input")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="how many to print (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: all scores, the top K, the latency")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--address", metavar="HOST:PORT", help="(this machine, port 8001 for gRPC, 8000 for HTTP)")
    parser.add_argument("--model", default=RANKER.name, help="model to ask: ranker, ranker_resident, … (%(default)s)")
    parser.add_argument(
        "--user",
        metavar="ID",
        help="whose history it is: a proxy before several servers finds the one that has cached the user (sent hashed)",
    )
    parser.add_argument(
        "--report", action="store_true", help="ask how the scores were made: cache, encode and fuse time"
    )
    parser.add_argument(
        "--prefetch", action="store_true", help="rank nothing: encode the history and cache it, for a later request"
    )
    parser.add_argument(
        "--deadline", type=float, default=DEFAULT_DEADLINE, metavar="SECONDS", help="for everything (%(default)g)"
    )
    parser.add_argument(
        "--retry",
        type=float,
        default=RETRY_SECONDS,
        metavar="SECONDS",
        help="how long to ask again a server that is away or busy (%(default)g; 0: ask once)",
    )
    add_connection_options(parser)
    return parser


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Add `--tls-ca` and `--header`, which `read_connection_options` reads."""
    parser.add_argument("--tls-ca", metavar="FILE", help="use TLS; PEM file of the CA of the server's certificate")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="HTTP header, or gRPC metadata, of every request; can be repeated",
    )


def read_connection_options(arguments: argparse.Namespace) -> tuple[TlsOptions | None, dict[str, str]]:
    """Return the TLS options of a command line, None for a connection in the clear, and its headers.

    Raises:
        ValueError: the file is missing, or a header has no colon.
    """
    headers = {}
    for header in arguments.header:
        name, colon, value = header.partition(":")
        if not colon:
            raise ValueError(f"--header: expected NAME:VALUE, got {header!r}")
        headers[name.strip()] = value.strip()
    return TlsOptions(ca_file=arguments.tls_ca) if arguments.tls_ca else None, headers


def main(argv: list[str] | None = None) -> int:
    """Rank; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        text = _read_text(arguments.request)
        tls, headers = read_connection_options(arguments)
        address = arguments.address or DEFAULT_ADDRESSES[arguments.protocol]
        with RankerClient(
            address,
            protocol=arguments.protocol,
            model=arguments.model,
            deadline=arguments.deadline,
            retry=RetryPolicy(seconds=arguments.retry),
            tls=tls,
            headers=headers,
        ) as client:
            manifest = client.get_manifest()
            request = RankRequest.from_json(text, manifest.schema)
            if arguments.prefetch:
                report = client.prefetch(request.history, user_id=arguments.user)
                print(report.to_json() if arguments.json else say_prefetch(report, len(request.history)))
                return 0
            ranking = client.rank(request.history, request.candidates, user_id=arguments.user, report=arguments.report)
        where = f"{arguments.model} at {address} ({arguments.protocol})"
        show = to_json if arguments.json else to_table
        print(show(ranking, arguments.top, len(request.history), where, manifest))
    except (AddressError, ValueError) as error:
        return _fail(str(error), WRONG_REQUEST)
    except InvalidRequestError as error:
        return _fail(f"the request is wrong: {error}", WRONG_REQUEST)
    except TryAgainError as error:
        return _fail(f"try again later: {error}", TRY_AGAIN)
    except KvcastError as error:
        return _fail(f"the server is broken: {error}", SERVER_FAULT)
    return 0


def to_table(ranking: Ranking, top: int, events: int, where: str, manifest: Manifest) -> str:
    """Return the ranking as a table."""
    lines = [
        f"{len(ranking.scores)} candidates after {events} events, ranked in {1e3 * ranking.seconds:.1f} ms by {where}",
        f"model {manifest.config}, release {manifest.release[:12]}",
        *([say_report(ranking.report)] if ranking.report else []),
        "",
        f"{'rank':>4}  {manifest.candidate_fields[0].name:>8}  {'score':>9}",
    ]
    lines += [
        f"{place:>4}  {candidate.item:>8}  {candidate.score:>9.5f}"
        for place, candidate in enumerate(ranking.top(top), start=1)
    ]
    return "\n".join(lines)


def to_json(ranking: Ranking, top: int, events: int, where: str, manifest: Manifest) -> str:
    """Return the ranking for machines."""
    table = {
        "scores": [float(score) for score in ranking.scores],
        "top": [vars(candidate) for candidate in ranking.top(top)],
        "milliseconds": 1e3 * ranking.seconds,
        "attempts": ranking.attempts,
        "events": events,
        "server": where,
        "config": manifest.config,
        "release": manifest.release,
    } | ({"report": vars(ranking.report)} if ranking.report else {})
    return json.dumps(table)


def say_report(report: Report) -> str:
    """Return a sentence on how the scores were made."""
    encode, fuse = 1e3 * report.encode_seconds, 1e3 * report.fuse_seconds
    if report.encode_seconds and not report.fuse_seconds:
        return f"cache {report.cache}: encoded and scored in one run of {encode:.1f} ms"
    return f"cache {report.cache}: encoded in {encode:.1f} ms, scored in {fuse:.1f} ms"


def say_prefetch(report: Report, events: int) -> str:
    """Return a sentence on the outcome of a prefetch."""
    return {
        CacheResult.MISS: f"{events} events encoded in {1e3 * report.encode_seconds:.1f} ms and cached",
        CacheResult.HIT: f"{events} events were cached already",
        CacheResult.OFF: "nothing was encoded: the server's cache is off, or too small for this user "
        "(user_kv_cache_megabytes in its config.pbtxt)",
    }[report.cache]


def _read_text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: cannot be read: {error}") from error


def _fail(message: str, status: int) -> int:
    print(f"kvcast rank: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

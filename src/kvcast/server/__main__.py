"""`python -m kvcast.server`: serve a model repository in the foreground, until Ctrl-C or SIGTERM."""

import argparse
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from kvcast.server.installation import ServerError
from kvcast.server.launcher import ServerSettings, TritonServer
from kvcast.server.log import FORMATS, open_log
from kvcast.server.repository import read_config_name


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast serve",
        description="Serve a model repository with tritonserver, in the foreground. Ctrl-C or SIGTERM ends it and "
        "everything that it started; a crash is followed by a new start.",
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--models", default="ranker", help="space-separated, e.g. 'ranker ranker_full' (%(default)s)")
    parser.add_argument("--config", help="refuse an export of another configuration than this (name or TOML file)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (%(default)s: this machine only)")
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="PORT")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT")
    parser.add_argument(
        "--set",
        type=read_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of config.pbtxt for every model that has it, e.g. user_kv_cache_megabytes=4096; repeatable",
    )
    parser.add_argument(
        "--leave-seconds",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long a server that is told to stop is not ready but still answers, until proxies have noticed; "
        "then it drains (%(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long requests that are there may take when the server is told to stop (%(default)s)",
    )
    parser.add_argument(
        "--shadow",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of rankings that ranker_full scores again, off the caller's path",
    )
    parser.add_argument(
        "--log-requests",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of requests of which the log gets a line of JSON: sizes, cache, times of each stage; no user data",
    )
    parser.add_argument("--log-format", choices=FORMATS, default=FORMATS[0], help="of standard error (%(default)s)")
    parser.add_argument(
        "--in-flight", type=int, default=16, metavar="N", help="requests to a model that Triton holds (%(default)s)"
    )
    parser.add_argument(
        "--waiting",
        type=int,
        default=256,
        metavar="N",
        help="requests to a model that may wait; more are refused as UNAVAILABLE (%(default)s)",
    )
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE.pem", help="serve gRPC and HTTP with TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE.pem")
    parser.add_argument("--tls-client-ca", type=Path, metavar="FILE.pem", help="callers need a certificate of this CA")
    parser.add_argument(
        "--unguarded", action="store_true", help="open Triton's own ports: no checks of HTTP bodies, no gates, no TLS"
    )
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="further flags for tritonserver, after --")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    arguments = make_parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        settings = ServerSettings(
            repository=arguments.repository,
            models=arguments.models.split(),
            config=read_config_name(arguments.config),
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            extra_flags=arguments.extra_flags,
            is_guarded=not arguments.unguarded,
            parameters=dict(arguments.set),
            leave_seconds=arguments.leave_seconds,
            drain_seconds=arguments.drain_seconds,
            shadow=arguments.shadow,
            log_requests=arguments.log_requests,
            in_flight=arguments.in_flight,
            waiting=arguments.waiting,
            tls_certificate=arguments.tls_certificate,
            tls_key=arguments.tls_key,
            tls_client_ca=arguments.tls_client_ca,
        )
        with open_log(arguments.log_format):
            serve(settings)
    except ServerError as error:
        print(f"kvcast serve: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("kvcast serve: stopped", file=sys.stderr)
        return 0
    return 1


def read_parameter(text: str) -> tuple[str, str]:
    """Return a parameter's name and value.

    Raises:
        argparse.ArgumentTypeError: it is not NAME=VALUE, or would not fit into a config.pbtxt.
    """
    found = re.fullmatch(r"([a-z_]+)=([\w.:/-]+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return found[1], found[2]


def serve(settings: ServerSettings) -> None:
    """Serve until told to stop.

    Raises:
        ServerError: it cannot start, ended by itself, or crashed too often.
    """
    with TritonServer(settings) as server:
        print(describe(server), flush=True)
        server.wait()


def describe(server: TritonServer) -> str:
    """Return what a person needs to know of a server that is ready."""
    settings = server.settings
    scheme = "https" if settings.tls_certificate else "http"
    return (
        f"kvcast: ready to answer with {', '.join(settings.models)}\n"
        f"  HTTP     {scheme}://{server.http_address}\n"
        f"  gRPC     {server.grpc_address}\n"
        f"  metrics  http://{server.metrics_address}/metrics\n"
        f"  admin key (model repository, shared memory, logging, trace) in {server.admin_key_file}\n"
        "Ctrl-C stops it."
    )


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 the signature of a signal handler
    """Leave the `with` block on the first signal; the clean-up itself is not interrupted by further ones."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

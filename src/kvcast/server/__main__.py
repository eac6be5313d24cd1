"""`python -m kvcast.server`: serve a model repository in the foreground, until Ctrl-C or SIGTERM."""

import argparse
import re
import signal
import sys
from types import FrameType

from kvcast.gateway.config import ServeConfig, add_options
from kvcast.protocol.errors import KvcastError
from kvcast.server.launcher import TritonServer
from kvcast.server.log import FORMATS, open_log
from kvcast.server.repository import read_config_name


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast serve",
        description="Serve a model repository with tritonserver, in the foreground. Ctrl-C or SIGTERM ends it and all "
        "processes that it started; after a crash it starts again.",
    )
    parser.add_argument("--models", default="ranker", help="space-separated, e.g. 'ranker ranker_full' (%(default)s)")
    parser.add_argument("--config", help="refuse an export of another configuration than this (name or TOML file)")
    parser.add_argument(
        "--set",
        dest="parameters",
        type=read_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of config.pbtxt for every model that has it, e.g. user_kv_cache_megabytes=4096; repeatable",
    )
    add_options(parser)
    parser.add_argument("--log-format", choices=FORMATS, default=FORMATS[0], help="of standard error (%(default)s)")
    parser.add_argument(
        "--unguarded",
        dest="is_guarded",
        action="store_false",
        help="open Triton's own ports: no checks, no admission control, no reasons of errors, no TLS",
    )
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="further flags for tritonserver, after --")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; return the exit status."""
    options = vars(make_parser().parse_args(argv))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        with open_log(options.pop("log_format")):
            options["models"] = options["models"].split()
            options["config"] = read_config_name(options["config"])
            options["parameters"] = dict(options["parameters"])
            serve(ServeConfig(**options))
    except KvcastError as error:
        print(f"kvcast serve: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("kvcast serve: stopped", file=sys.stderr)
        return 0
    return 1


def read_parameter(text: str) -> tuple[str, str]:
    """Return the name and the value of NAME=VALUE."""
    found = re.fullmatch(r"([a-z_]+)=([\w.:/-]+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return found[1], found[2]


def serve(settings: ServeConfig) -> None:
    """Serve until interrupted; raises if the server cannot start, ends by itself or crashes too often."""
    with TritonServer(settings) as server:
        print(describe(server), flush=True)
        server.wait()


def describe(server: TritonServer) -> str:
    """Return the text that is printed when a server is ready."""
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
    """Leave the `with` block on the first signal; further signals do not interrupt the clean-up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

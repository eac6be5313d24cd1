"""`kvcast demo`: the whole way once, on a real server: start it, rank the example request, stop it."""

import argparse
import signal
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvcast.client.__main__ import main as rank
from kvcast.clicklog import ClickLog
from kvcast.contract.config import load_config
from kvcast.server import ServerError, ServerSettings, TritonServer

from kvcast.server.repository import ensure_exported, read_config_name


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="kvcast demo", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--config", default="bench", help="name or TOML file; exported first if need be (%(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="PORT")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    settings = ServerSettings(
        repository=arguments.repository,
        config=read_config_name(arguments.config),
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
    )
    try:
        ensure_exported(arguments.repository, settings.models, arguments.config)
        print("starting tritonserver …", flush=True)
        started = time.perf_counter()
        with TritonServer(settings) as server, tempfile.NamedTemporaryFile("w", suffix=".json") as request:
            request.write(_make_request(arguments.config))
            request.flush()
            print(f"ready after {time.perf_counter() - started:.1f} s\n", flush=True)
            status = rank([request.name, "--top", "10", "--address", server.grpc_address])
        print("\nthe server is stopped")
    except ServerError as error:
        print(f"kvcast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _make_request(config_name: str) -> str:
    """Return the shipped example, which is one for `bench`; for another configuration, one of its own."""
    if config_name == "bench":
        return (resources.files("kvcast.client") / "examples" / "request.json").read_text()
    config = load_config(config_name)
    request = ClickLog(config.schema, seed=7).draw_request(config.workload.history, config.workload.candidates)
    return request.to_json(config.schema)


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 the signature of a signal handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

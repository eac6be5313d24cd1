"""`kvcast demo`: the whole way once, on a real server: start it, rank the example request, stop it."""

import argparse
import signal
import subprocess
import sys
import time
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvcast.client.__main__ import main as rank
from kvcast.contract.tensors import RANKER
from kvcast.server import ServerError, ServerSettings, TritonServer

from kvcast.server.__main__ import read_config_name
from kvcast.server.repository import check_repository


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
    if not _is_exported(arguments.repository, arguments.config):
        print(f"{arguments.repository} has no export of {arguments.config} yet; making it", flush=True)
        command = [sys.executable, "-m", "kvcast.export", "--config", arguments.config]
        status = subprocess.run([*command, "--repository", str(arguments.repository)], check=False).returncode
        if status:
            return status
    settings = ServerSettings(
        repository=arguments.repository,
        config=read_config_name(arguments.config),
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
    )
    try:
        print("starting tritonserver …", flush=True)
        started = time.perf_counter()
        with TritonServer(settings) as server, resources.as_file(_example()) as request:
            print(f"ready after {time.perf_counter() - started:.1f} s\n", flush=True)
            status = rank([str(request), "--top", "10", "--address", server.grpc_address])
        print("\nthe server is stopped")
    except ServerError as error:
        print(f"kvcast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _is_exported(repository: Path, config: str) -> bool:
    try:
        check_repository(repository, [RANKER.name], read_config_name(config))
    except ServerError:
        return False
    return True


def _example() -> Traversable:
    return resources.files("kvcast.client") / "examples" / "request.json"


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 the signature of a signal handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""`kvcast demo`: the whole way once, on a real server: start it, rank for one user, show what came out, stop it."""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvcast.client import RankerClient
from kvcast.client.__main__ import main as rank
from kvcast.protocol.config import DEFAULT_CONFIG, ModelConfig, load_config
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.tensors import RANKER
from kvcast.server import ServeConfig, TritonServer
from kvcast.server.repository import ensure_exported, read_config_name
from kvcast.synthetic import ClickLog, Habits, PlantedLog, Shop, Visitor, draw_visitor
from kvcast.synthetic.visitor import describe_ranking, describe_visitor

# The weights of `demo` were trained on the users of seed 1 (docs/training.md): these are others, in the same shop.
LOG_SEED = 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="kvcast demo", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help="name or TOML file; exported first if need be (%(default)s). For any but demo, whose weights and shop "
        "belong together, the output is ids and scores",
    )
    parser.add_argument(
        "--user", type=int, metavar="NUMBER", help=f"the user to rank for, with demo: 1 to {Habits().users} (1)"
    )
    parser.add_argument("--http-port", type=int, default=8000, metavar="PORT")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="PORT")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config)
        visitor = _draw_visitor(config, arguments.user)
        return _run(arguments, config, visitor)
    except KvcastError as error:
        print(f"kvcast demo: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


def _draw_visitor(config: ModelConfig, user: int | None) -> Visitor | None:
    """Return a user of the shop that the weights of `demo` know; None for another configuration.

    Raises:
        ValueError: there is no such user.
    """
    if config.name != DEFAULT_CONFIG:
        if user is not None:
            raise ValueError(f"--user: only {DEFAULT_CONFIG} has users, got --user {user} and --config {config.name}")
        return None
    log = PlantedLog(Shop(config.schema), Habits(), LOG_SEED)
    return draw_visitor(log, 1 if user is None else user, config.workload.history, config.workload.candidates)


def _run(arguments: argparse.Namespace, config: ModelConfig, visitor: Visitor | None) -> int:
    """Serve and rank; return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    settings = ServeConfig(
        repository=arguments.repository,
        config=read_config_name(arguments.config),
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
    )
    ensure_exported(arguments.repository, settings.models, arguments.config)
    print("starting tritonserver …", flush=True)
    started = time.perf_counter()
    with TritonServer(settings) as server:
        print(f"ready after {time.perf_counter() - started:.1f} s\n", flush=True)
        status = _rank_ids(config, server) if visitor is None else _show(visitor, server)
    print(f"\nthe server is stopped{'' if visitor is None else '; another user: kvcast demo --user 2'}")
    return status


def _show(visitor: Visitor, server: TritonServer) -> int:
    """Rank for a user, and show it beside what the user likes; return the exit status."""
    print(f"{describe_visitor(visitor)}\n", flush=True)
    with RankerClient(server.grpc_address) as client:
        release = client.get_manifest().release[:12]
        ranking = client.rank(visitor.request.history, visitor.request.candidates)
    print(f"ranked in {1e3 * ranking.seconds:.1f} ms by {RANKER.name} at {server.grpc_address}, release {release}\n")
    print(describe_ranking(visitor, ranking.scores))
    return 0


def _rank_ids(config: ModelConfig, server: TritonServer) -> int:
    """Rank a generated request as `kvcast rank` does; return the exit status."""
    request = ClickLog(config.schema, seed=7).draw_request(config.workload.history, config.workload.candidates)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(request.to_json(config.schema))
        file.flush()
        return rank([file.name, "--top", "10", "--address", server.grpc_address])


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 the signature of a signal handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

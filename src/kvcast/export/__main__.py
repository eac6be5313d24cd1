"""`python -m kvcast.export`: export a configuration into a Triton model repository, proved exact."""

import argparse
import sys
from pathlib import Path

from kvcast.export.cache import CACHE_VARIABLE, find_cache
from kvcast.export.pipeline import export_release
from kvcast.networks.weights import WeightsSource
from kvcast.protocol.config import DEFAULT_CONFIG, list_configs, load_config
from kvcast.protocol.errors import KvcastError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast export",
        description="Export a network as four ONNX graphs with manifests. Each graph is held against the torch network "
        "on every kind of request; six properties (exactness, independence of candidates, padding, …) are proved in "
        "torch and again through the ONNX files. An artefact that fails a proof is refused and the repository stays as "
        "it was.",
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help=f"{', '.join(list_configs())}, or the path of a TOML file (%(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="trained weights (those that the configuration comes with; if it has none, random ones)",
    )
    source.add_argument("--seed", type=int, help="draw random weights from this seed")
    parser.add_argument(
        "--accept-undirected",
        action="store_true",
        help="export weights trained with the undirected mask: their scores will differ from those in training",
    )
    parser.add_argument(
        "--repository",
        type=Path,
        required=True,
        metavar="DIR",
        help="the model repository to write into; made if it does not exist",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="trace the graphs even if code and configuration are those of an earlier export, whose graphs are kept in "
        f"${CACHE_VARIABLE}, else in ~/.cache/kvcast",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the export; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        config = load_config(arguments.config)
        source = WeightsSource(arguments.weights, arguments.seed, arguments.accept_undirected)
        cache = None if arguments.no_cache else find_cache()
        export_release(config, source, arguments.repository, lambda line: print(line, flush=True), cache)
    except KvcastError as error:
        print(f"kvcast export: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"kvcast export: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

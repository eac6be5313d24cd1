"""`python -m kvcast.clicklog`: print a generated request, as `client/examples/request.json` was made."""

import argparse
import sys

from kvcast.clicklog.generator import ClickLog
from kvcast.contract.config import load_config


def main(argv: list[str] | None = None) -> int:
    """Print one request as JSON; return the exit status."""
    parser = argparse.ArgumentParser(prog="kvcast clicklog", description="Print a synthetic ranking request as JSON.")
    parser.add_argument("--config", default="bench", help="whose schema and workload (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=int, metavar="L", help="events (the configuration's workload)")
    parser.add_argument("--candidates", type=int, metavar="N", help="candidates (the configuration's workload)")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config)
    history = config.workload.history if arguments.history is None else arguments.history
    count = config.workload.candidates if arguments.candidates is None else arguments.candidates
    print(ClickLog(config.schema, arguments.seed).draw_request(history, count).to_json(config.schema), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

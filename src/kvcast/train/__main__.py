"""`kvcast train`: train a network on a click log; compare masks, time a step, check and make logs."""

import argparse
import sys

import torch

from kvcast.protocol.errors import KvcastError
from kvcast.train import log_command, run_command, speed, study

# `kvcast train --config …` is `kvcast train run --config …`. A command's description is its module's docstring.
DEFAULT_COMMAND = "run"
COMMANDS = {
    DEFAULT_COMMAND: (run_command, "train (also without this word)"),
    "speed": (speed, "time a step against a row a candidate"),
    "log": (log_command, "check a log, or make one from a data set"),
    "study": (study, "train with each mask and compare"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = [DEFAULT_COMMAND, *argv]
    parser = argparse.ArgumentParser(prog="kvcast train", description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, (command, summary) in COMMANDS.items():
        command.add_options(parsers.add_parser(name, help=summary, description=command.__doc__))
    arguments = parser.parse_args(argv)
    try:
        if getattr(arguments, "threads", None):
            torch.set_num_threads(arguments.threads)
        status: int = COMMANDS[arguments.command][0].run(arguments)
    except KvcastError as error:
        print(f"kvcast train: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

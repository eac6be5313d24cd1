"""`python -m kvcast.deploy`: what an operator's files need to know of an exported model."""

import argparse
import sys

from kvcast.deploy import sizes


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast deploy", description="Compute what an operator's files need to know of an exported model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    size = commands.add_parser("size", help="what one server needs: memory, shared memory, cores, time to stop")
    sizes.add_arguments(size)
    size.set_defaults(run=sizes.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(words, argparse.Namespace(words=words))
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

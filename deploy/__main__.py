"""`python -m kvcast.deploy`: what an operator's files need to know of an exported model."""

import argparse
import sys


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast deploy", description="Compute what an operator's files need to know of an exported model."
    )
    parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = make_parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

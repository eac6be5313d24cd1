"""The front door: `kvcast <command>`. Each command lives in its room and runs as `python -m kvcast.<room>` too."""

import importlib
import sys

from kvcast.protocol.errors import KvcastError

# command → (module with `main(argv)`, what it is for)
COMMANDS = {
    "train": ("kvcast.train.__main__", "train a network on a click log"),
    "export": ("kvcast.export.__main__", "export a network into a model repository, proved exact"),
    "serve": ("kvcast.server.__main__", "serve a model repository with tritonserver"),
    "release": ("kvcast.server.release", "publish releases, choose which one is served, go back"),
    "rank": ("kvcast.client.__main__", "rank the candidates of a JSON request on a running server"),
    "probe": ("kvcast.client.probe", "say whether a running server ranks, for health checks"),
    "clicklog": ("kvcast.synthetic.__main__", "draw a synthetic ranking request, or a log with known truth"),
    "demo": ("kvcast.demo", "serve, rank for one user of a small shop, show it, stop"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(describe())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"kvcast: expected one of {', '.join(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        extras = {"train": "train", "export": "export", "serve": "server", "demo": "server"}
        extra = extras.get(command)
        hint = f"pip install 'kvcast[{extra}]'" if extra else "pip install kvcast"
        print(f"kvcast {command}: {error.name} is not installed: {hint}", file=sys.stderr)
        return 1
    try:
        status: int = module.main(rest)
    except (KvcastError, OSError) as error:
        print(f"kvcast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def describe() -> str:
    """Return the list of commands."""
    lines = ["usage: kvcast COMMAND …      kvcast COMMAND --help says more", ""]
    lines += [f"  {name:<9} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""`kvcast release`: publish exports as immutable releases, and choose the one that is served, without a restart."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import urllib3

from kvcast.protocol.config import list_configs
from kvcast.protocol.errors import KvcastError
from kvcast.server.installation import ServerError
from kvcast.server.releases import AlreadyPublishedError, Record, Release, ReleaseStore

POLL_SECONDS = 0.2
DEFAULT_SERVER = "127.0.0.1:8000"

EXAMPLE = """\
examples:
  kvcast release push new.safetensors   # from a training job: export, publish, activate, delete the oldest

step by step:
  kvcast export --config bench --weights new.safetensors --repository build/new
  kvcast release publish build/new
  kvcast release activate 2        # running servers load it beside the old one, try it, and switch
  kvcast release rollback          # back to the one before

exit status: 0 done, 1 refused; the release that was served before still is
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvcast release",
        description="Publish exports as immutable, checksummed releases, and choose which one is served. A server "
        "tries a release with its golden request before it switches. One command at a time changes what is served: "
        "another waits for it, and says so.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="push | publish | list | activate | rollback"
    )
    push = commands.add_parser("push", help="export trained weights, publish them and serve them")
    push.add_argument("weights", type=Path, metavar="WEIGHTS.safetensors")
    push.add_argument("--config", help="name or TOML file (that of the release that is served)")
    push.add_argument("--keep", type=int, default=5, metavar="COUNT", help="releases to keep (%(default)s)")
    push.add_argument(
        "--keep-gigabytes", type=float, default=100.0, metavar="GB", help="bytes that they may have (%(default)s)"
    )
    publish = commands.add_parser("publish", help="copy an export into the repository as its next release")
    publish.add_argument("source", type=Path, metavar="EXPORT", help="folder that `kvcast export` has written")
    listing = commands.add_parser("list", help="print the releases")
    activate = commands.add_parser("activate", help="serve a release")
    activate.add_argument("release", metavar="RELEASE", help="its number, or the first characters of its id")
    rollback = commands.add_parser("rollback", help="serve the release that was active before")
    for command in (push, publish, listing, activate, rollback):
        command.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    listing.add_argument("--json", action="store_true", help="print the record as JSON")
    for command in (push, activate, rollback):
        command.add_argument(
            "--server", action="append", metavar="HOST:PORT",
            help=f"HTTP address of a running server to wait for; may be repeated ({DEFAULT_SERVER}, if one is there)",
        )  # fmt: skip
        command.add_argument("--wait", type=float, default=900.0, metavar="SECONDS", help="for servers (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = make_parser().parse_args(argv)
    store = ReleaseStore(arguments.repository)
    try:
        if arguments.command == "publish":
            publish(store, arguments.source)
        elif arguments.command == "list":
            print(to_json(store.read()) if arguments.json else to_table(store.read()))
        else:
            with store.switching(lambda: print("another command is switching releases: waiting for it", flush=True)):
                _switch(store, arguments)
    except (KvcastError, OSError) as error:
        print(f"kvcast release {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _switch(store: ReleaseStore, arguments: argparse.Namespace) -> None:
    """Run a command that changes which release is served."""
    record = store.read()
    number = record.previous
    if arguments.command == "push":
        config = arguments.config or find_config(record)
        number = push(store, arguments.weights, config)
    elif arguments.command == "activate":
        number = record.find(arguments.release).release_number
    if number is None:
        raise ServerError("no release was active before the one that is: `kvcast release list` shows them")
    activate(store, number, arguments.server or [], arguments.wait)
    if arguments.command == "push":
        for release in store.prune(arguments.keep, arguments.keep_gigabytes * 1e9):
            print(f"release {release.release_number} ({release.release_id[:12]}) is deleted")


def push(store: ReleaseStore, weights: Path, config: str) -> int:
    """Export weights and publish them, if that was not done before; return the release's number.

    Raises:
        ServerError: the export failed, which has said why; or it cannot be published.
    """
    with tempfile.TemporaryDirectory(dir=store.repository.resolve().parent, prefix=".kvcast-push-") as folder:
        source = Path(folder) / "export"
        command = [sys.executable, "-m", "kvcast.export", "--config", config, "--repository", str(source)]
        if subprocess.run([*command, "--weights", str(weights)], check=False).returncode:
            raise ServerError(f"{weights} could not be exported; what is served stays as it is")
        try:
            return publish(store, source).release_number
        except AlreadyPublishedError as error:
            print(f"release {error.release.release_number} has these weights")
            return error.release.release_number


def publish(store: ReleaseStore, source: Path) -> Release:
    """Publish an export, and say what became of it."""
    release = store.publish(source)
    print(f"release {release.release_number} ({release.release_id[:12]}, {release.config}) is published")
    others = ", ".join(store.find_other_configs(source))
    if others:
        print(f"the config.pbtxt of {others} stays as it is in {store.repository}: the export has another")
    return release


def find_config(record: Record) -> str:
    """Return the configuration of the release that is served, or of the newest.

    Raises:
        ServerError: there is none, or it is no configuration that comes with the package.
    """
    releases = [each for each in record.releases if each.release_number == record.active] or record.releases[-1:]
    if not releases or releases[0].config not in list_configs():
        name = releases[0].config if releases else "none"
        raise ServerError(f"config: expected one of {', '.join(list_configs())}, got {name}: give --config FILE.toml")
    return releases[0].config


def activate(store: ReleaseStore, number: int, named: list[str], seconds: float) -> None:
    """Activate a release and wait until the servers have switched; if one refuses, activate the old one again."""
    for server in named:
        if read_state(server) is None:
            raise ServerError(f"{server}: no answer: is a kvcast server there, and is this its HTTP port?")
    servers = named or [server for server in [DEFAULT_SERVER] if read_state(server) is not None]
    before = store.activate(number)
    try:
        for server in servers:
            wait_for(server, number, time.monotonic() + seconds)
            print(f"{server} serves release {number}")
    except (ServerError, KeyboardInterrupt):
        store.restore(before)
        raise
    if not servers:
        print(
            f"release {number} is active: servers of {store.repository} follow within a second or at their next start"
        )


def wait_for(server: str, number: int, deadline: float) -> None:
    """Wait until a server serves a release; it may refuse to.

    Raises:
        ServerError: it refuses, or the time is over.
    """
    while time.monotonic() < deadline:
        state = read_state(server) or {}
        if state.get("release_number") == number:
            return
        if state.get("refused_release") == number:
            raise ServerError(f"{server} refuses release {number}: {state.get('refused_reason')}")
        time.sleep(POLL_SECONDS)
    raise ServerError(f"{server} does not serve release {number} yet: is {number} published in its own repository?")


def read_state(server: str) -> dict[str, Any] | None:
    """Return the state that a server reports, None if there is no server."""
    try:
        reply = urllib3.request("GET", f"http://{server}/kvcast/state", timeout=5, retries=False)
        state: dict[str, Any] = reply.json()
    except (ValueError, urllib3.exceptions.HTTPError):
        return None
    return state if reply.status == 200 else None


def to_table(record: Record) -> str:
    """Return the releases as a table, newest last."""
    if not record.releases:
        return "nothing is published yet: `kvcast release publish EXPORT`"
    lines = [f"{'':6}  {'number':>6}  {'release':12}  {'config':8}  published"]
    for each in record.releases:
        mark = {record.active: "active", record.previous: "before"}.get(each.release_number, "")
        lines.append(f"{mark:6}  {each.release_number:>6}  {each.release_id[:12]}  {each.config:8}  {each.published}")
    return "\n".join(lines)


def to_json(record: Record) -> str:
    """Return the releases as JSON, without their files."""
    table = msgspec.to_builtins(record)
    for release in table["releases"]:
        del release["files"]
    return json.dumps(table)


if __name__ == "__main__":
    sys.exit(main())

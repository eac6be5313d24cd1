"""`kvcast release`: publish exports as immutable releases, and choose the one that is served, without a restart."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import urllib3

from kvcast.protocol.errors import KvcastError
from kvcast.server.installation import ServerError
from kvcast.server.releases import Record, ReleaseStore

POLL_SECONDS = 0.2
DEFAULT_SERVER = "127.0.0.1:8000"

EXAMPLE = """\
example:
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
        "tries a release with its golden request before it switches.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="publish | list | activate | rollback")
    publish = commands.add_parser("publish", help="copy an export into the repository as its next release")
    publish.add_argument("source", type=Path, metavar="EXPORT", help="folder that `kvcast export` has written")
    listing = commands.add_parser("list", help="print the releases")
    activate = commands.add_parser("activate", help="serve a release")
    activate.add_argument("release", metavar="RELEASE", help="its number, or the first characters of its id")
    rollback = commands.add_parser("rollback", help="serve the release that was active before")
    for command in (publish, listing, activate, rollback):
        command.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    listing.add_argument("--json", action="store_true", help="print the record as JSON")
    for command in (activate, rollback):
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
            release = store.publish(arguments.source)
            print(f"release {release.release_number} ({release.release_id[:12]}, {release.config}) is published")
            others = ", ".join(store.find_other_configs(arguments.source))
            if others:
                print(f"the config.pbtxt of {others} stays as it is in {store.repository}: the export has another")
        elif arguments.command == "list":
            print(to_json(store.read()) if arguments.json else to_table(store.read()))
        else:
            record = store.read()
            number = record.previous
            if arguments.command == "activate":
                number = record.find(arguments.release).release_number
            if number is None:
                raise ServerError("no release was active before the one that is: `kvcast release list` shows them")
            activate(store, number, arguments.server or [], arguments.wait)
    except (KvcastError, OSError) as error:
        print(f"kvcast release {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


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

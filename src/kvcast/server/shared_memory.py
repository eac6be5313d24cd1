"""The shared-memory regions that Triton makes in `/dev/shm`: ownership, removal, free space.

Each server's regions have a prefix of their own, and a file beside them that the server keeps locked as long as one of
its processes lives. Regions whose lock is free are left over
(github.com/triton-inference-server/server/issues/7481) and are removed; regions without such a file are not ours.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from kvcast.server.installation import ServerError

FOLDER = Path("/dev/shm")  # noqa: S108 where Triton keeps its regions
PREFIX = "kvcast_"
OWNER = "_owner"


def make_prefix(instance: str) -> str:
    """Return the prefix of a server's regions."""
    return f"{PREFIX}{instance}_"


def claim(instance: str) -> int:
    """Lock a server's owner file; return the descriptor, which the server's processes inherit.

    Raises:
        ServerError: `/dev/shm` cannot be written.
    """
    path = FOLDER / f"{PREFIX}{instance}{OWNER}"
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ServerError(f"{path}: cannot be made ({error.strerror}): Triton needs it for its regions") from error
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # another server removed it as a leftover before it was locked


def list_regions(instance: str) -> list[Path]:
    """Return a server's regions, without its owner file."""
    return [region for region in FOLDER.glob(f"{make_prefix(instance)}*") if not region.name.endswith(OWNER)]


def remove_regions(instance: str) -> None:
    """Remove a server's regions; its owner file stays."""
    for region in list_regions(instance):
        region.unlink(missing_ok=True)


def hide_regions(instance: str) -> None:
    """Make a server's regions readable by their owner only: they hold requests, and Triton makes them world-readable.

    To be called after every load; a region keeps its mode as long as its process lives.
    """
    for region in list_regions(instance):
        with contextlib.suppress(FileNotFoundError):  # its process has ended
            region.chmod(0o600)


def release(instance: str) -> None:
    """Remove a server's regions, and then its owner file."""
    remove_regions(instance)
    (FOLDER / f"{PREFIX}{instance}{OWNER}").unlink(missing_ok=True)


def remove_leftovers() -> list[str]:
    """Remove the regions of servers that were killed; return their instances."""
    removed = []
    for path in FOLDER.glob(f"{PREFIX}*{OWNER}"):
        instance = path.name.removeprefix(PREFIX).removesuffix(OWNER)
        if not instance.isalnum():  # any user can make a file here, and `*` would match every server's regions
            continue
        with contextlib.suppress(OSError):  # another user's, or locked
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                release(instance)
                removed.append(instance)
            finally:
                os.close(descriptor)
    return removed


def check_room(needed: int) -> None:
    """Check that regions of this many bytes fit.

    Raises:
        ServerError: they do not.
    """
    free = shutil.disk_usage(FOLDER).free
    if free < needed:
        raise ServerError(
            f"{FOLDER}: expected {needed / 1e6:.0f} MB free for the models' shared memory, got {free / 1e6:.0f} MB: "
            "make it larger (docker run --shm-size=…, a Kubernetes emptyDir of medium Memory), or serve fewer instances"
        )

"""The regions that Triton makes in `/dev/shm`: whose they are, which belong to nobody, and whether there is room.

Each server's regions bear a prefix of its own, beside a file that the server holds locked as long as one of its
processes lives. A region whose owner's lock is free belongs to nobody; one without such a file is not ours to touch.
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
    """Return how the names of a server's regions begin."""
    return f"{PREFIX}{instance}_"


def claim(instance: str) -> int:
    """Say that a server lives; return the file descriptor whose lock says so, for the server's processes to inherit.

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
        os.close(descriptor)  # somebody took it for a leftover before it was locked


def list_regions(instance: str) -> list[Path]:
    """Return a server's regions, without its claim."""
    return [region for region in FOLDER.glob(f"{make_prefix(instance)}*") if not region.name.endswith(OWNER)]


def remove_regions(instance: str) -> None:
    """Remove a server's regions; its claim stays."""
    for region in list_regions(instance):
        region.unlink(missing_ok=True)


def hide_regions(instance: str) -> None:
    """Let nobody but their owner read a server's regions: requests lie there, and Triton lets everybody read them.

    To be called whenever models have been loaded; a region keeps its mode as long as its process lives.
    """
    for region in list_regions(instance):
        with contextlib.suppress(FileNotFoundError):  # its process has ended
            region.chmod(0o600)


def release(instance: str) -> None:
    """Remove a server's regions, and then its claim."""
    remove_regions(instance)
    (FOLDER / f"{PREFIX}{instance}{OWNER}").unlink(missing_ok=True)


def remove_leftovers() -> list[str]:
    """Remove the regions of servers that were killed before they could; return whose."""
    removed = []
    for path in FOLDER.glob(f"{PREFIX}*{OWNER}"):
        instance = path.name.removeprefix(PREFIX).removesuffix(OWNER)
        if not instance.isalnum():  # anybody can put a file there, and `*` would be everybody's regions
            continue
        with contextlib.suppress(OSError):  # another user's, or somebody was quicker
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                release(instance)
                removed.append(instance)
            finally:
                os.close(descriptor)
    return removed


def check_room(needed: int) -> None:
    """Check that regions of so many bytes fit.

    Raises:
        ServerError: they do not.
    """
    free = shutil.disk_usage(FOLDER).free
    if free < needed:
        raise ServerError(
            f"{FOLDER}: expected {needed / 1e6:.0f} MB free for the models' shared memory, got {free / 1e6:.0f} MB: "
            "make it larger (docker run --shm-size=…, a Kubernetes emptyDir of medium Memory), or serve fewer instances"
        )

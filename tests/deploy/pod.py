"""`python pod.py SPEC.json`: run a pod's container on this machine as a node would, as far as a user may.

In namespaces of its own: every file system read-only but for the volumes that the pod mounts writable, a network of
nothing but a loopback, the security context's user, no capability and no way to get one. The image's place is taken by
this machine's file system. What else a node does (cgroups, seccomp, addresses) is not here. To be started by
`unshare --user --map-root-user --mount --net`; the process that stays there is this one, which passes SIGTERM on.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

SYS_PIVOT_ROOT, SYS_MOUNT_SETATTR = 155, 442  # x86-64
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MNT_DETACH = -100, 0x8000, 1, 2
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
LIBC = ctypes.CDLL(None, use_errno=True)


def main(file: str) -> int:
    """Run the container to its end; return its exit status.

    The file has: root (an empty folder, for the container's file system), volumes (folders by mount path, mounted
    read-only), writable (options of a tmpfs by mount path), keep (folders that the container needs to see, whatever
    hides them), user and group (numbers), environment, command.
    """
    spec: dict[str, Any] = json.loads(Path(file).read_text())
    make_root(lay_out(spec))
    raise_loopback()
    user = ["unshare", "--user", f"--map-user={spec['user']}", f"--map-group={spec['group']}"]
    command = [*user, "setpriv", "--no-new-privs", "--", *spec["command"]]
    with subprocess.Popen(command, env=spec["environment"]) as container:
        signal.signal(signal.SIGTERM, lambda *_: container.terminate())
        return container.wait()


def lay_out(spec: dict[str, Any]) -> Path:
    """Put the container's file system together."""
    root = Path(spec["root"])
    mount("-t", "tmpfs", "tmpfs", root)
    for entry in Path("/").iterdir():
        if entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            bind(entry, root)
    for path, folder in spec["volumes"].items():
        (root / path[1:]).mkdir(parents=True)
        mount("--rbind", folder, root / path[1:])
    make_read_only(root)
    mount("--rbind", "/proc", root / "proc")  # containers may write there, and a user's namespace is set up there
    for path, options in spec["writable"].items():
        mount("-t", "tmpfs", "-o", options, "tmpfs", root / path[1:])
    seen: list[Path] = []
    for folder in map(Path, spec["keep"]):
        is_hidden = any(folder.is_relative_to(path) for path in spec["writable"])
        if is_hidden and not any(folder.is_relative_to(path) for path in seen):
            bind(folder, root)
            make_read_only(root / folder.relative_to("/"))
            seen.append(folder)
    return root


def bind(folder: Path, root: Path) -> None:
    """Let a folder of this machine be seen at its own path."""
    target = root / folder.relative_to("/")
    target.mkdir(parents=True)
    mount("--rbind", folder, target)


def mount(*arguments: str | Path) -> None:
    """Run the mount program."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def make_read_only(folder: Path) -> None:
    """Make a mount read-only, with all that is mounted below it: what mount(8) of Debian 12 cannot do (Linux 5.12)."""
    wanted = struct.pack("=4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    path = os.fsencode(folder)
    check(LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted))))


def make_root(folder: Path) -> None:
    """Make a mount the root, and let the old one go."""
    os.chdir(folder)
    check(LIBC.syscall(SYS_PIVOT_ROOT, b".", b"."))
    check(LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/")


def check(status: int) -> None:
    """Look whether a system call has worked.

    Raises:
        OSError: it has not.
    """
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def raise_loopback() -> None:
    """Make 127.0.0.1 answer in a new network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

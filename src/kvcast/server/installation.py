"""Where tritonserver is and what it needs: the one on PATH with its backends, or the one in the nvidia-pytriton wheel.

The wheel has the server and the Python backend, but the backend's stub (one per Python version) in another folder. A
folder of symlinks combines them; a copied stub would not find its libraries.
"""

import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcast.protocol.errors import KvcastError

STUB = "triton_python_backend_stub"
PYTHON_BACKEND = ("libtriton_python.so", STUB)
BACKENDS_FLAG = "--backend-directory"
# Where Triton itself looks.
DEFAULT_BACKENDS = Path("/opt/tritonserver/backends")


class ServerError(KvcastError):
    """The server cannot be started or has stopped; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver: its binary, extra flags, and changes to the environment."""

    binary: Path
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def find_installation(workspace: Path, flags: Sequence[str] = ()) -> Installation:
    """Find a tritonserver: the one on PATH (as in the NGC image) if there is one, else the wheel's.

    Args:
        workspace: a private folder, for the links to the wheel's backend.
        flags: those of the command line, which may name the folder of backends.

    Raises:
        ServerError: there is none, or something that it needs is missing.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Installation(Path(on_path), _find_backends(Path(on_path), flags))
    wheel = importlib.util.find_spec("pytriton")
    if wheel is None or not wheel.submodule_search_locations:
        raise ServerError(
            "tritonserver is neither on PATH nor installed as a wheel: run `make setup`, or "
            "`pip install 'kvcast[server]'`, or use NVIDIA's Triton image"
        )
    root = Path(wheel.submodule_search_locations[0]) / "tritonserver"
    backends = _link_backends(root, workspace)
    interpreter = Path(sys.executable).parent
    return Installation(
        binary=root / "bin" / "tritonserver",
        flags=[f"{BACKENDS_FLAG}={backends}"],
        environment={
            "LD_LIBRARY_PATH": _prepend(_find_libpython_folder(), "LD_LIBRARY_PATH"),
            # The stub runs the first python on PATH, and with it the virtual environment's packages.
            "PATH": _prepend(interpreter, "PATH"),
        },
    )


def _find_backends(binary: Path, flags: Sequence[str]) -> list[str]:
    """Return the flag with the backends beside a server on PATH; none if the caller, or a script, names them."""
    with binary.open("rb") as file:
        is_script = file.read(2) == b"#!"
    if is_script or any(flag.startswith(BACKENDS_FLAG) for flag in flags):
        return []
    places = [binary.parent.parent / "backends", binary.resolve().parent.parent / "backends", DEFAULT_BACKENDS]
    for folder in places:
        if all((folder / "python" / name).exists() for name in PYTHON_BACKEND):
            return [f"{BACKENDS_FLAG}={folder}"]
    raise ServerError(
        f"{binary} has no Python backend: expected {' and '.join(PYTHON_BACKEND)} in the folder python of one of "
        f"{', '.join(map(str, dict.fromkeys(places)))}: install it there, or name its folder: "
        f"`kvcast serve … -- {BACKENDS_FLAG}=DIR`"
    )


def _link_backends(root: Path, workspace: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / STUB
    if not stub.exists():
        has = ", ".join(sorted(path.name for path in stub.parent.parent.iterdir()))
        raise ServerError(f"tritonserver's wheel has no stub for Python {version}: use one of {has}")
    backend = workspace / "backends" / "python"
    backend.mkdir(parents=True)
    for source in [*(root / "backends" / "python").iterdir(), stub]:
        (backend / source.name).symlink_to(source)
    return backend.parent


def _find_libpython_folder() -> Path:
    """Return the folder of this interpreter's shared library, which the stub is linked against."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"libpython{version}.so.1.0"
    candidates = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    candidates += [f"/usr/lib/{multiarch}"] if multiarch else []
    for folder in filter(None, candidates):
        if (Path(folder) / name).exists():
            return Path(folder)
    if ctypes.util.find_library(f"python{version}"):
        return Path(sys.base_prefix) / "lib"  # the loader's own search path has it
    raise ServerError(
        f"{name} is missing, which Triton's Python backend is linked against: install it "
        f"(Debian: apt-get install libpython{version}) or use a Python built with --enable-shared"
    )


def _prepend(folder: Path, variable: str) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get(variable)]))

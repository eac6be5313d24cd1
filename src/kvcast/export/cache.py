"""Templates of traced graphs on disk, so that an export of which only the weights are new traces nothing.

An entry is addressed by all that a trace depends on: configuration, the state of the network's modules other than its
weights, the source of every module that is loaded and no library, and the versions of what is installed. It is one
file with its own checksum; a damaged one counts as none. Whatever is taken from here is proved again.
"""

import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import msgspec
import numpy as np
import torch

from kvcast.export.template import GraphTemplate, list_weights
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig

CACHE_VARIABLE = "KVCAST_CACHE"
SUFFIX = ".traces"
MOST_ENTRIES, MOST_BYTES = 50, 1 << 30
# What of a module has names of its own.
HELD_APART = {"_parameters", "_buffers", "_modules"}
PACKAGE = Path(__file__).resolve().parents[1]


class LimitProofs(msgspec.Struct, frozen=True):
    """The proofs at the limits of these graphs: with the weights of which release, in how many seconds.

    other_seconds: of all other proofs of that export.
    """

    release: str
    seconds: float
    other_seconds: float


class Entry(msgspec.Struct, frozen=True):
    """What is kept of an export."""

    templates: tuple[GraphTemplate, ...]
    limits: LimitProofs


class NoKeyError(Exception):
    """A network whose traces cannot be kept; the text says why."""


class TraceCache:
    """A folder of entries; the least recently used ones are deleted."""

    def __init__(self, folder: Path) -> None:
        """Use this folder, which is made when something is stored."""
        self._folder = folder

    def load(self, key: str) -> Entry | None:
        """Return an entry, None if there is none that is undamaged."""
        path = self._folder / f"{key}{SUFFIX}"
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if hashlib.sha256(key.encode() + content[32:]).digest() != content[:32]:
            return None
        return msgspec.msgpack.decode(content[32:], type=Entry)

    def store(self, key: str, entry: Entry) -> None:
        """Write an entry as a whole, and delete what is too much; a folder that cannot be written stays as it is."""
        content = msgspec.msgpack.encode(entry)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(hashlib.sha256(key.encode() + content).digest() + content)
            Path(file.name).replace(self._folder / f"{key}{SUFFIX}")
            self._prune()
        except OSError:
            return

    def _prune(self) -> None:
        found = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for index, path in enumerate(found):
            total += path.stat().st_size
            if index and (index >= MOST_ENTRIES or total > MOST_BYTES):
                path.unlink(missing_ok=True)


def find_cache_folder() -> Path:
    """Return the folder that $KVCAST_CACHE names, else `kvcast` in the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcast"


def make_key(network: RankingNetwork) -> str:
    """Return the address of a network's traces: the SHA-256 (hex) of all that they depend on, values of weights apart.

    Raises:
        NoKeyError: a module holds something of which it cannot be told whether it is the same in another process.
    """
    described = {
        "config": network.config.list_settings(),
        "network": _NetworkState(network).describe(),
        "sources": sorted(_hash_sources({type(module).__module__ for module in network.modules()})),
        "installed": sorted({each.name for folder in sys.path for each in Path(folder).glob("*.dist-info")}),
        "python": [platform.python_version(), platform.machine()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class _NetworkState:
    """Describes what a network's modules hold, as JSON that is the same for the same content in every process."""

    def __init__(self, network: RankingNetwork) -> None:
        self._modules = dict(network.named_modules(remove_duplicate=False))
        self._weights = list_weights(network)
        self._names = {id(each): name for name, each in (*self._modules.items(), *self._weights.items())}

    def describe(self) -> Any:
        """Return shapes and ties of the weights, and all else that the modules hold."""
        weights = {
            name: [str(each.dtype), list(each.shape), self._names[id(each)]] for name, each in self._weights.items()
        }
        return [weights, {name: self._describe_module(module) for name, module in self._modules.items()}]

    def _describe_module(self, module: torch.nn.Module) -> list[Any]:
        kind, own = type(module), vars(module)
        try:
            held = {name: self._describe_value(own[name]) for name in sorted(own.keys() - HELD_APART)}
        except (NoKeyError, RecursionError) as error:
            raise NoKeyError(f"{kind.__qualname__} holds {error}") from error
        return [kind.__module__, kind.__qualname__, held]

    def _describe_value(self, value: Any) -> Any:  # noqa: PLR0911, C901 a line a kind
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex | bytes | Path | range | torch.dtype | torch.device):
            return [type(value).__name__, repr(value)]
        if id(value) in self._names:
            return ["of the network", self._names[id(value)]]
        if isinstance(value, torch.Tensor):
            return ["tensor", self._describe_value(value.detach().cpu().numpy())]
        if isinstance(value, np.ndarray | np.generic):
            return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
        if isinstance(value, list | tuple):
            return [type(value).__name__, [self._describe_value(each) for each in value]]
        if isinstance(value, set | frozenset):
            return [type(value).__name__, sorted((self._describe_value(each) for each in value), key=repr)]
        if isinstance(value, dict):
            return [[self._describe_value(each) for each in pair] for pair in value.items()]
        if isinstance(value, type | BuiltinFunctionType):
            return [value.__module__, value.__qualname__]
        if isinstance(value, FunctionType) and not value.__closure__:
            code = value.__code__
            body = [code.co_code.hex(), repr(code.co_consts), repr(code.co_names)]
            defaults = self._describe_value([value.__defaults__, value.__kwdefaults__])
            return [value.__module__, value.__qualname__, body, defaults]
        if isinstance(value, ModelConfig):
            return value.list_settings()
        if isinstance(value, msgspec.Struct):
            return [type(value).__qualname__, msgspec.to_builtins(value)]
        raise NoKeyError(f"a {type(value).__qualname__}, whose content cannot be compared")


def _hash_sources(families: Collection[str]) -> Iterator[tuple[str, str]]:
    """Return name and SHA-256 (hex) of the file of each loaded module that is no library.

    families: the modules that the network's classes come from; the program that runs is one of the others.
    """
    modules = [module for name, module in list(sys.modules.items()) if name != "__main__" or name in families]
    files = {Path(file).resolve() for each in modules if (file := getattr(each, "__file__", None))}
    own = {path for package in ("export", "networks", "protocol") for path in (PACKAGE / package).glob("*.py")}
    for path in own | {path for path in files if path.is_file() and not _is_library(path)}:
        yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def _is_library(path: Path) -> bool:
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(path.is_relative_to(folder.resolve()) for folder in (PACKAGE, *folders))

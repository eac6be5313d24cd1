"""Templates of traced graphs on disk, so that an export of which only the weights are new traces nothing.

An entry is addressed by all that a trace depends on: configuration, the state of the network's modules other than its
weights, the operators and constants of a small request (numbers come from anywhere: a class, an environment variable),
the source of every module that is loaded and no library, and the versions of what is installed. It is one file with its
own checksum; a damaged one counts as none. Whatever is taken from here is proved again.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterator, MutableMapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import msgspec
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from kvcast.export.graphs import describe_graphs
from kvcast.export.template import GraphTemplate, list_weights
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig

CACHE_VARIABLE = "KVCAST_CACHE"
SUFFIX = ".traces"
MOST_ENTRIES, MOST_BYTES = 50, 1 << 30
# What of a module has names of its own.
HELD_APART = {"_parameters", "_buffers", "_modules"}
PACKAGE = Path(__file__).resolve().parents[1]
# Packages whose version says what they are, though the network's classes come from them; of our own, see below.
VERSIONED = {"abc", "builtins", "kvcast", "torch", "typing"}


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
        except OSError:
            return None
        with contextlib.suppress(OSError):  # of a folder that can only be read
            os.utime(path)
        if hashlib.sha256(key.encode() + content[32:]).digest() != content[:32]:
            return None
        return msgspec.msgpack.decode(content[32:], type=Entry)

    def store(self, key: str, entry: Entry) -> None:
        """Write an entry as a whole, and delete what is too much; a folder that cannot be written stays as it is."""
        content = msgspec.msgpack.encode(entry)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as own:  # nothing is left behind on a full disk
                made = Path(own) / key
                made.write_bytes(hashlib.sha256(key.encode() + content).digest() + content)
                made.replace(self._folder / f"{key}{SUFFIX}")
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


def find_cache() -> TraceCache | None:
    """Return the cache in the folder that $KVCAST_CACHE names, else in the user's cache folder, if the user has one."""
    if own := os.environ.get(CACHE_VARIABLE):
        return TraceCache(Path(own))
    try:
        return TraceCache(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcast")
    except RuntimeError:  # a container's user may have no home
        return None


@torch.inference_mode()
def make_key(network: RankingNetwork) -> str:
    """Return the address of a network's traces: the SHA-256 (hex) of all that they depend on, values of weights apart.

    Raises:
        NoKeyError: a module holds something of which it cannot be told whether it is the same in another process.
    """
    described = {
        "config": network.config.list_settings(),
        "steps": _hash_steps(network),
        "network": _NetworkState(network).describe(),
        "sources": sorted(
            _hash_sources({each.__module__ for part in network.modules() for each in type(part).__mro__})
        ),
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
        except Exception as error:  # content of any type, and what it raises when it is looked at
            raise NoKeyError(f"{kind.__qualname__} holds {error}") from error
        return [kind.__module__, kind.__qualname__, held]

    def _describe_value(self, value: Any) -> Any:  # noqa: PLR0911, C901 a line a kind
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex | bytes | Path | range | torch.dtype | torch.device):
            return [type(value).__name__, repr(value)]
        if isinstance(value, torch.nn.Module) and id(value) in self._names:
            return ["of the network", self._names[id(value)]]
        if isinstance(value, torch.Tensor):  # a weight too: what is not found by its name is a constant of the trace
            return ["tensor", _describe_tensor(value)]
        if isinstance(value, np.ndarray | np.generic):
            return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
        if isinstance(value, list | tuple):
            return [type(value).__name__, [self._describe_value(each) for each in value]]
        if isinstance(value, set | frozenset):
            return [type(value).__name__, sorted((self._describe_value(each) for each in value), key=repr)]
        if isinstance(value, dict):
            return [[self._describe_value(each) for each in pair] for pair in value.items()]
        if isinstance(value, type) or (
            isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType | type | None)
        ):
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


class _Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hashes the operators that run and what each is given: weights by name, results by number, else by content."""

    def __init__(self, network: RankingNetwork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        names = {each: name for name, each in list_weights(network).items()}
        self._names: MutableMapping[torch.Tensor, str | int] = WeakTensorKeyDictionary(names)
        self._count = 0
        self.hash = hashlib.sha256()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        self.hash.update(f"{func} {tree_map(self._describe, (args, kwargs))}\n".encode())
        results = func(*args, **(kwargs or {}))
        self.number(results)
        return results

    def number(self, tensors: Any) -> None:
        """Give numbers to tensors, instead of their content."""
        for each in tree_leaves(tensors):
            if isinstance(each, torch.Tensor):
                self._count += 1
                self._names[each] = self._count

    def _describe(self, value: Any) -> Any:
        return (self._names.get(value) or _describe_tensor(value)) if isinstance(value, torch.Tensor) else value


def _hash_steps(network: RankingNetwork) -> str:
    """Return the SHA-256 (hex) of what the network runs in the place of each graph, on the request of the trace."""
    steps = _Steps(network)
    try:
        for graph in describe_graphs(network):
            steps.number(graph.sample)  # in which is user KV, made of weights
            with steps:
                graph.module(*graph.sample)
    except Exception as error:  # a family's own mistakes have any type; the trace says more of them
        raise NoKeyError(f"the network fails on a small request: {error}") from error
    return steps.hash.hexdigest()


def _describe_tensor(value: torch.Tensor) -> list[Any]:
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(value.dtype), list(value.shape), hashlib.sha256(content.data).hexdigest()]


def _hash_sources(families: Collection[str]) -> Iterator[tuple[str, str]]:
    """Return name and SHA-256 (hex) of the file of each loaded module that is no library, or of a family's package.

    families: the modules that the network's classes come from; the program that runs is one of the others.
    """
    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]

    def is_library(path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in (PACKAGE, *libraries))

    packages = {name.partition(".")[0] for name in families} - VERSIONED
    files = {
        name: Path(file).resolve()
        for name, module in list(sys.modules.items())
        if (name != "__main__" or name in families) and (file := getattr(module, "__file__", None))
    }
    used = {
        name: path
        for name, path in files.items()
        if path.is_file() and (name.partition(".")[0] in packages or not is_library(path))
    }
    own = {
        f"{each}/{path.name}": path
        for each in ("export", "networks", "protocol")
        for path in (PACKAGE / each).glob("*.py")
    }
    for name, path in (used | own).items():
        yield name, hashlib.sha256(path.read_bytes()).hexdigest()

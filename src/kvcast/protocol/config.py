"""A model configuration, read from TOML: the network's size, its vocabularies, the limits that are served.

Shipped are `demo` (the default, with trained weights), `tiny` (tests), `bench` (load tests), `seed` (the source
documents' size), and `tiny-hstu` and `hstu`, the second network family at the sizes of `tiny` and `bench`.
"""

import keyword
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvcast.protocol.decoding import Count, convert
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.locate import locate
from kvcast.protocol.schema import FeatureSchema, Field, Limits, Workload

# The default of `kvcast export` and `kvcast demo`.
DEFAULT_CONFIG = "demo"
CONFIGS = "export/configs"
MIN_VOCABULARY = 2  # unknown, and one more
# The proofs of an export need room for a history with padding around it.
MIN_HISTORY_LIMIT = 8
_VOCABULARY_SIZE: Any = Annotated[int, msgspec.Meta(ge=MIN_VOCABULARY)]
# What an option of a network family may be; the family checks its meaning.
Option = str | int | float | bool


@dataclass(frozen=True)
class NetworkConfig:
    """The network family and its size: M layers, H heads, model width d.

    family: its short name if it comes with the project, `package.module:Class`, or `path/to/file.py:Class` from the
    folder of the TOML file. options: the family's own, which it checks. folder: the TOML file's; no part of the
    model.
    """

    family: str
    layers: int
    heads: int
    width: int
    options: dict[str, Option] = field(default_factory=dict, hash=False)
    folder: Path = field(default=Path(), compare=False)

    @property
    def head_width(self) -> int:
        """The width of one head, dh = d / H."""
        return self.width // self.heads


@dataclass(frozen=True)
class ModelConfig:
    """Everything that, with the weights, decides what a model computes and accepts.

    weights: the file of trained weights that comes with it, exported unless others are asked for; it may be missing.
    """

    name: str
    network: NetworkConfig
    schema: FeatureSchema
    limits: Limits
    workload: Workload
    weights: Path | None = field(default=None, compare=False)

    @property
    def time_field(self) -> str:
        """The history field with an event's time, which the option `time_field` of a family names; empty if none."""
        return str(self.network.options.get("time_field", ""))

    def list_settings(self) -> dict[str, Any]:
        """Return all that defines a model, without the paths of its files, as nested tables."""
        settings: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        del settings["weights"]
        del settings["network"]["folder"]
        return settings


class _Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    family: str
    layers: Count
    heads: Count
    width: Count
    options: dict[str, Any] = {}


class _Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    history: list[str]
    candidates: list[str]


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The TOML file."""

    name: str
    network: _Network
    vocabularies: dict[str, Any]
    fields: _Fields
    limits: Limits
    workload: Workload
    weights: str | None = None


def list_configs() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(path.stem for path in locate(CONFIGS).glob("*.toml"))


def load_config(name_or_path: str) -> ModelConfig:
    """Read a configuration by its name (`demo`, `tiny`, `bench`, …) or by the path of a TOML file.

    Raises:
        ConfigError: there is no such configuration, or a key is missing, unknown, or its value cannot be used.
    """
    if name_or_path in list_configs():
        path = locate(CONFIGS) / f"{name_or_path}.toml"
    elif Path(name_or_path).is_file():
        path = Path(name_or_path)
    else:
        known = ", ".join(list_configs())
        raise ConfigError(f"config: expected one of {known} or the path of a TOML file, got {name_or_path!r}")
    try:
        table = msgspec.toml.decode(path.read_text())
    except msgspec.DecodeError as error:
        raise ConfigError(f"config {name_or_path}: not valid TOML: {error}") from error
    return parse_config(table, path.parent)


def parse_config(table: dict[str, Any], folder: Path = Path()) -> ModelConfig:
    """Build a configuration from a parsed TOML table; paths in it start at `folder`.

    Raises:
        ConfigError: a key is missing, unknown, or its value cannot be used.
    """
    read = convert(table, _Config, "config", ConfigError)
    for name, size in read.vocabularies.items():  # one by one: msgspec does not name a table's key
        convert(size, _VOCABULARY_SIZE, f"vocabularies.{name}", ConfigError)
    _check(read)
    schema = FeatureSchema(
        tuple(Field(name, read.vocabularies[name]) for name in read.fields.history),
        tuple(Field(name, read.vocabularies[name]) for name in read.fields.candidates),
    )
    network = NetworkConfig(**msgspec.structs.asdict(read.network), folder=folder)
    weights = None if read.weights is None else Path(os.path.normpath(folder / read.weights))
    return ModelConfig(read.name, network, schema, read.limits, read.workload, weights)


def _check(read: _Config) -> None:
    """Check what types cannot express."""
    network, limits, workload = read.network, read.limits, read.workload
    family = "a family's short name, 'package.module:Class' or 'file.py:Class'"
    _expect(":" in network.family or network.family.isidentifier(), "network.family", family, network.family)
    multiple = network.width % network.heads == 0
    _expect(multiple, "network.width", f"a multiple of heads = {network.heads}", network.width)
    for name, option in network.options.items():
        usable = isinstance(option, str | int) or (isinstance(option, float) and math.isfinite(option))
        _expect(usable, f"network.options.{name}", "a string, a finite number or a boolean", option)
    keywords = [name for name in read.vocabularies if keyword.iskeyword(name)]
    _expect(not keywords, "vocabularies", "names that are no keywords of Python, in whose code a trace is", keywords)
    for side, names in msgspec.structs.asdict(read.fields).items():
        different = 0 < len(names) == len(set(names))
        _expect(different, f"fields.{side}", "a list of different names, at least one", names)
        unknown = [name for name in names if name not in read.vocabularies]
        _expect(not unknown, f"fields.{side}", "names listed under [vocabularies]", unknown)
    _expect(limits.history >= MIN_HISTORY_LIMIT, "limits.history", f"at least {MIN_HISTORY_LIMIT}", limits.history)
    within = workload.history <= limits.history and workload.candidates <= limits.candidates
    _expect(within, "workload", f"it within limits {limits}", workload)
    is_weights = read.weights is None or read.weights.endswith(".safetensors")
    _expect(is_weights, "weights", "a file *.safetensors", read.weights)


def _expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")

"""A model configuration, read from TOML: the network's size, its vocabularies, the limits that are served.

With the project come `demo` (the default, with trained weights), `tiny` (tests), `bench` (load tests), `seed` (the
source documents' size), and `tiny-hstu` and `hstu`, the second network family at the sizes of `tiny` and `bench`. The
module reads and checks; it builds nothing.
"""

import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvcast.protocol.errors import ConfigError
from kvcast.protocol.locate import locate
from kvcast.protocol.schema import FeatureSchema, Field, Limits, Workload

# What is exported where nothing else is said, and what `kvcast demo` shows.
DEFAULT_CONFIG = "demo"
CONFIGS = "export/configs"
MIN_VOCABULARY = 64
# The proofs of an export need room for a history with padding around it.
MIN_HISTORY_LIMIT = 8
# What is expected of a value, in words and as a check.
Expectation = tuple[str, Callable[[Any], bool]]
POSITIVE: Expectation = ("a whole number, at least 1", lambda value: value > 0)
VOCABULARY: Expectation = (
    f"a whole number, at least {MIN_VOCABULARY} (ids 0 to size - 1)",
    lambda size: size >= MIN_VOCABULARY,
)
FAMILY: Expectation = (
    "a family's short name, 'package.module:Class' or 'file.py:Class'",
    lambda name: ":" in name or name.isidentifier(),
)
NAMES: Expectation = (
    "a list of different names, at least one",
    lambda names: bool(names) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names),
)
WEIGHTS_FILE: Expectation = ("a file *.safetensors", lambda name: name.endswith(".safetensors"))
# What an option of a network family may be; what it means is the family's to say.
Option = str | int | float | bool


@dataclass(frozen=True)
class NetworkConfig:
    """The network family and its size: M layers, H heads, model width d.

    family: its short name if it comes with the project, `package.module:Class`, or `path/to/file.py:Class` from the
    folder of the TOML file. options: the family's own, which it checks. folder: where the TOML file lies; no part of
    what the model is.
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

    def list_settings(self) -> dict[str, Any]:
        """Return what decides a model as nested tables: all of it but where its files lie."""
        settings = asdict(self)
        del settings["weights"]
        del settings["network"]["folder"]
        return settings


def list_configs() -> list[str]:
    """Return the names of the configurations that come with the project."""
    return sorted(path.stem for path in locate(CONFIGS).glob("*.toml"))


def load_config(name_or_path: str) -> ModelConfig:
    """Read a configuration by its name (`demo`, `tiny`, `bench`, …) or by the path of a TOML file.

    Raises:
        ConfigError: there is no such configuration, or it does not describe a model.
    """
    if name_or_path in list_configs():
        path = locate(CONFIGS) / f"{name_or_path}.toml"
    elif Path(name_or_path).is_file():
        path = Path(name_or_path)
    else:
        known = ", ".join(list_configs())
        raise ConfigError(f"config: expected one of {known} or the path of a TOML file, got {name_or_path!r}")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {name_or_path}: not valid TOML: {error}") from error
    config = parse_config(table)
    weights = config.weights and Path(os.path.normpath(path.parent / config.weights))
    return replace(config, network=replace(config.network, folder=path.parent), weights=weights)


def parse_config(table: dict[str, Any]) -> ModelConfig:
    """Build a configuration from a parsed TOML table; what it says of files is left as it is written.

    Raises:
        ConfigError: a key is missing, unknown, or its value cannot be used.
    """
    sections = {"name", "network", "vocabularies", "fields", "limits", "workload"}
    _expect_keys(table, "config", sections, optional="weights")
    config = ModelConfig(
        name=_read(table["name"], "name", str, "a string"),
        network=_parse_network(table["network"]),
        schema=_parse_schema(table["fields"], table["vocabularies"]),
        limits=Limits(**_positive_numbers(table, "limits", ("history", "candidates"))),
        workload=Workload(**_positive_numbers(table, "workload", ("history", "candidates"))),
        weights=Path(_read(table["weights"], "weights", str, *WEIGHTS_FILE)) if "weights" in table else None,
    )
    if config.limits.history < MIN_HISTORY_LIMIT:
        raise ConfigError(f"limits.history: expected at least {MIN_HISTORY_LIMIT}, got {config.limits.history}")
    if config.workload.history > config.limits.history or config.workload.candidates > config.limits.candidates:
        raise ConfigError(f"workload: expected it within limits {config.limits}, got {config.workload}")
    return config


def _parse_network(table: dict[str, Any]) -> NetworkConfig:
    _expect_keys(table, "network", {"family", "layers", "heads", "width"}, optional="options")
    sizes = {key: _read(table[key], f"network.{key}", int, *POSITIVE) for key in ("layers", "heads", "width")}
    options = _parse_options(table.get("options", {}))
    network = NetworkConfig(family=_read(table["family"], "network.family", str, *FAMILY), **sizes, options=options)
    if network.width % network.heads:
        raise ConfigError(f"network.width: expected a multiple of heads = {network.heads}, got {network.width}")
    return network


def _parse_options(table: object) -> dict[str, Option]:
    if not isinstance(table, dict):
        raise ConfigError(f"network.options: expected a table, got {table!r}")
    for name, value in table.items():
        if not isinstance(value, Option) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"network.options.{name}: expected a string, a finite number or a boolean, got {value!r}")
    return table


def _parse_schema(fields: dict[str, Any], vocabularies: object) -> FeatureSchema:
    _expect_keys(fields, "fields", {"history", "candidates"})
    if not isinstance(vocabularies, dict):
        raise ConfigError(f"vocabularies: expected a table, got {vocabularies!r}")
    sizes = {name: _read(size, f"vocabularies.{name}", int, *VOCABULARY) for name, size in vocabularies.items()}

    def fields_of(side: str) -> tuple[Field, ...]:
        names = _read(fields[side], f"fields.{side}", list, *NAMES)
        unknown = [name for name in names if name not in sizes]
        if unknown:
            raise ConfigError(f"fields.{side}: expected names listed under [vocabularies], got {unknown}")
        return tuple(Field(name, sizes[name]) for name in names)

    return FeatureSchema(history_fields=fields_of("history"), candidate_fields=fields_of("candidates"))


def _positive_numbers(table: dict[str, Any], section: str, keys: tuple[str, ...]) -> dict[str, int]:
    _expect_keys(table[section], section, set(keys))
    return {key: _read(table[section][key], f"{section}.{key}", int, *POSITIVE) for key in keys}


def _expect_keys(table: object, section: str, keys: set[str], *, optional: str = "") -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{section}: expected a table, got {table!r}")
    if set(table) - {optional} != keys:
        raise ConfigError(f"{section}: expected the keys {sorted(keys)}, got {sorted(table)}")


def _read(value: Any, name: str, kind: type, expected: str, is_usable: Callable[[Any], bool] = lambda _: True) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) or not is_usable(value):
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
    return value

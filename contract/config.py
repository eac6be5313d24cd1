"""A model configuration, read from TOML: the network's size, its vocabularies, the limits that are served.

With the project come `tiny` (tests), `bench` (the default), `seed` (the source documents' size), and `tiny-hstu` and
`hstu`, the second network family at the sizes of the first two. The module reads and checks; it builds nothing.
"""

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from kvcast.contract.errors import ConfigError
from kvcast.contract.schema import FeatureSchema, Field, Limits, Workload

MIN_VOCABULARY = 64
# The proofs of an export need room for a history with padding around it.
MIN_HISTORY_LIMIT = 8
# What an option of a network family may be; what it means is the family's to say.
Option = str | int | float | bool


@dataclass(frozen=True)
class NetworkConfig:
    """The network family and its size: M layers, H heads, model width d.

    family: `package.module:Class`, or `path/to/file.py:Class` from the folder of the TOML file. options: the family's
    own, which it checks. folder: where the TOML file lies; no part of what the model is.
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
    """Everything that, with the weights, decides what a model computes and accepts."""

    name: str
    network: NetworkConfig
    schema: FeatureSchema
    limits: Limits
    workload: Workload


def list_configs() -> list[str]:
    """Return the names of the configurations that come with the project."""
    folder = resources.files("kvcast.contract") / "configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_config(name_or_path: str) -> ModelConfig:
    """Read a configuration by its name (`tiny`, `bench`, `seed`) or by the path of a TOML file.

    Raises:
        ConfigError: there is no such configuration, or it does not describe a model.
    """
    if name_or_path in list_configs():
        text, folder = (resources.files("kvcast.contract") / "configs" / f"{name_or_path}.toml").read_text(), Path()
    elif Path(name_or_path).is_file():
        text, folder = Path(name_or_path).read_text(), Path(name_or_path).parent
    else:
        known = ", ".join(list_configs())
        raise ConfigError(f"config: expected one of {known} or the path of a TOML file, got {name_or_path!r}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {name_or_path}: not valid TOML: {error}") from error
    config = parse_config(table)
    return replace(config, network=replace(config.network, folder=folder))


def parse_config(table: dict[str, Any]) -> ModelConfig:
    """Build a configuration from a parsed TOML table.

    Raises:
        ConfigError: a key is missing, unknown, or its value cannot be used.
    """
    _expect_keys(table, "config", {"name", "network", "vocabularies", "fields", "limits", "workload"})
    config = ModelConfig(
        name=_read(table, "name", str),
        network=_parse_network(table["network"]),
        schema=_parse_schema(table["fields"], table["vocabularies"]),
        limits=Limits(**_positive_numbers(table, "limits", ("history", "candidates"))),
        workload=Workload(**_positive_numbers(table, "workload", ("history", "candidates"))),
    )
    if config.limits.history < MIN_HISTORY_LIMIT:
        raise ConfigError(f"limits.history: expected at least {MIN_HISTORY_LIMIT}, got {config.limits.history}")
    if config.workload.history > config.limits.history or config.workload.candidates > config.limits.candidates:
        raise ConfigError(f"workload: expected it within limits {config.limits}, got {config.workload}")
    return config


def _parse_network(table: dict[str, Any]) -> NetworkConfig:
    _expect_keys(table, "network", {"family", "layers", "heads", "width"}, optional="options")
    sizes = {key: _read(table, key, int, lambda value: value > 0) for key in ("layers", "heads", "width")}
    options = _parse_options(table.get("options", {}))
    network = NetworkConfig(family=_read(table, "family", str, lambda value: ":" in value), **sizes, options=options)
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


def _parse_schema(fields: dict[str, Any], vocabularies: dict[str, Any]) -> FeatureSchema:
    _expect_keys(fields, "fields", {"history", "candidates"})
    sizes = {name: _read(vocabularies, name, int, lambda size: size >= MIN_VOCABULARY) for name in vocabularies}

    def fields_of(side: str) -> tuple[Field, ...]:
        names = _read(fields, side, list, lambda names: len(names) > 0 and len(set(names)) == len(names))
        unknown = [name for name in names if name not in sizes]
        if unknown:
            raise ConfigError(f"fields.{side}: expected names listed under [vocabularies], got {unknown}")
        return tuple(Field(name, sizes[name]) for name in names)

    return FeatureSchema(history_fields=fields_of("history"), candidate_fields=fields_of("candidates"))


def _positive_numbers(table: dict[str, Any], section: str, keys: tuple[str, ...]) -> dict[str, int]:
    _expect_keys(table[section], section, set(keys))
    return {key: _read(table[section], key, int, lambda value: value > 0) for key in keys}


def _expect_keys(table: object, section: str, keys: set[str], *, optional: str = "") -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{section}: expected a table, got {table!r}")
    if set(table) - {optional} != keys:
        raise ConfigError(f"{section}: expected the keys {sorted(keys)}, got {sorted(table)}")


def _read(table: dict[str, Any], key: str, kind: type, is_usable: Callable[[Any], bool] = lambda _: True) -> Any:
    value = table[key]
    if not isinstance(value, kind) or isinstance(value, bool) or not is_usable(value):
        raise ConfigError(f"{key}: expected a usable {kind.__name__}, got {value!r}")
    return value

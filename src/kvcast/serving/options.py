"""What an operator sets in the `parameters` of a `config.pbtxt`, read as Triton passes it on."""

from dataclasses import dataclass
from typing import Any

from kvcast.protocol.errors import ServerFaultError
from kvcast.serving.artefact import SessionOptions

BYTES_PER_MEGABYTE = 1_000_000
SESSION_PARAMETERS = ("execution_provider", "intra_op_threads")
CACHE_BUDGET = "user_kv_cache_megabytes"
CACHE_PARAMETERS = (CACHE_BUDGET, "user_kv_cache_seconds")


@dataclass(frozen=True)
class CacheOptions:
    """The user KV cache: how many bytes it may hold (0: it is off), and for how many seconds (0: no limit)."""

    budget_bytes: int = 0
    time_to_live: float = 0.0


CACHE_OFF = CacheOptions()


@dataclass(frozen=True)
class ModelOptions:
    """Everything that can be set."""

    session: SessionOptions
    cache: CacheOptions


def read_options(config: dict[str, Any]) -> ModelOptions:
    """Read the options from a model's configuration in Triton's JSON.

    Raises:
        ServerFaultError: a value cannot be used, or a parameter is not known.
    """
    parameters = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
    known = SESSION_PARAMETERS + CACHE_PARAMETERS
    # Triton's own are in capitals.
    unknown = [name for name in parameters if name not in known and not name.isupper()]
    if unknown:
        raise ServerFaultError(f"parameter {unknown[0]}: expected one of {', '.join(known)}")
    groups = config.get("instance_group", [])
    session = SessionOptions(
        provider=parameters.get("execution_provider", "auto"),
        threads=int(_read_number(parameters, "intra_op_threads")),
        instances=max(1, sum(int(group.get("count", 1)) for group in groups)),
    )
    megabytes, seconds = (_read_number(parameters, name) for name in CACHE_PARAMETERS)
    return ModelOptions(session, CacheOptions(int(megabytes * BYTES_PER_MEGABYTE), seconds))


def _read_number(parameters: dict[str, str], name: str) -> float:
    text = parameters.get(name, "0")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ServerFaultError(f"parameter {name}: expected a number, 0 or more, got {text!r}")
    return number

"""Typed records from JSON and TOML (msgspec), with errors that name the place, what was expected and what came."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

T = TypeVar("T")
# Characters of a wrong value that an error quotes.
LONGEST_VALUE = 200
Count = Annotated[int, msgspec.Meta(ge=1)]
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


def read_file(path: Path, remedy: str, error_type: type[Exception]) -> str:
    """Return a file's text.

    Raises:
        error_type: it cannot be read; the message ends with the remedy.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise error_type(f"{path}: cannot be read ({why}): {remedy}") from error


def decode_json(text: str | bytes, kind: type[T], name: str, error_type: type[Exception]) -> T:
    """Read a record from JSON.

    Raises:
        error_type: the text is not JSON, a key is missing or unknown, or a value has another type.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise error_type(f"{name}: expected JSON, got {error}") from error
    return convert(value, kind, name, error_type)


def convert(value: Any, kind: type[T], name: str, error_type: type[Exception]) -> T:
    """Build a record from parsed TOML or JSON.

    Raises:
        error_type: as for `decode_json`.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise error_type(_explain(error, value, kind, name)) from error


def _explain(error: msgspec.ValidationError, value: Any, kind: Any, name: str) -> str:
    """Return msgspec's message with the place in front and, after it, what stands there."""
    message, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    expected = message.partition(", got ")[0].replace("Expected", "expected")
    try:
        for step in re.findall(r"[^.\[\]]+", path):
            is_list = isinstance(value, list)
            value, kind = (value[int(step)], _item(kind)) if is_list else (value[step], _fields(kind)[step])
    except (KeyError, TypeError, IndexError):  # a key with a dot in it
        return f"{name}: {error}"
    got = repr(value)[:LONGEST_VALUE]
    is_record = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    if "bject" in expected and is_record:  # it is none, lacks a key or has an unknown one
        expected = f"expected the keys {sorted(_fields(kind))}"
        got = str(sorted(value))[:LONGEST_VALUE] if isinstance(value, dict) else got
    place = f"{name}: {path.removeprefix('.')}" if path else name
    return f"{place}: {expected}, got {got}"


def _item(kind: Any) -> Any:
    """Return the type of the items of a list or tuple, which may be annotated, or one side of a union."""
    while get_origin(kind) not in (list, tuple):
        kind = get_args(kind)[0]
    return get_args(kind)[0]


def _fields(kind: Any) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}

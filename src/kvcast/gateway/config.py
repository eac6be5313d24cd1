"""What `kvcast serve` is told, written once: its command line, the launcher's settings, the gateway's.

The launcher hands a gateway process one `GatewayConfig` as JSON over a socket, and then a `State` whenever that
changes.
"""

import argparse
import enum
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvcast.protocol.errors import ConfigError

LOOPBACK = "127.0.0.1"
# What a field of `ServeConfig` is on the command line: how its value is called there.
METAVAR = "metavar"


def option(metavar: str, text: str, **limits: Any) -> Meta:
    """Return what turns a field into an option of the command line: its value's name, its help, and its limits."""
    return Meta(description=text, extra={METAVAR: metavar}, **limits)


Port = option("PORT", "(%(default)s)", ge=0, le=65535)


@dataclass(frozen=True)
class ServeConfig:
    """What to serve and where. `config`: the name that the export must have, None for any.

    `is_guarded`: False leaves Triton's own ports open, without checks, admission control, shadow or TLS. `parameters`:
    values instead of those in the `config.pbtxt` of each model that has such a parameter.
    """

    repository: Annotated[Path, option("DIR", "the model repository (%(default)s)")] = Path("model_repository")
    models: list[str] = field(default_factory=lambda: ["ranker"])
    config: str | None = None
    host: Annotated[str, option("ADDRESS", "address to bind to (%(default)s: this machine only)")] = LOOPBACK
    http_port: Annotated[int, Port] = 8000
    grpc_port: Annotated[int, Port] = 8001
    metrics_port: Annotated[int, Port] = 8002
    start_timeout_seconds: float = 900
    extra_flags: list[str] = field(default_factory=list)
    is_guarded: bool = True
    parameters: dict[str, str] = field(default_factory=dict)
    leave_seconds: Annotated[
        float,
        option(
            "SECONDS",
            "on SIGTERM: how long the server reports not ready and still answers, until proxies have noticed; then it "
            "drains (%(default)s)",
            ge=0,
            lt=1e9,
        ),
    ] = 0.0
    drain_seconds: Annotated[
        float,
        option("SECONDS", "on SIGTERM: how long requests that are there may take (%(default)s)", ge=0, lt=1e9),
    ] = 30.0
    shadow: Annotated[
        float,
        option("SHARE", "share of rankings that ranker_full scores again, off the caller's path", ge=0, le=1),
    ] = 0.0
    log_requests: Annotated[
        float,
        option(
            "SHARE",
            "share of requests that are logged as lines of JSON: sizes, cache, times of each stage; no user data",
            ge=0,
            le=1,
        ),
    ] = 0.0
    in_flight: Annotated[int, option("N", "requests to a model that Triton holds (%(default)s)", ge=1)] = 16
    waiting: Annotated[
        int,
        option("N", "requests to a model that may wait; more are refused as RESOURCE_EXHAUSTED (%(default)s)", ge=0),
    ] = 256
    tls_certificate: Annotated[Path | None, option("FILE.pem", "serve gRPC and HTTP with TLS")] = None
    tls_key: Annotated[Path | None, option("FILE.pem", "the certificate's private key")] = None
    tls_client_ca: Annotated[Path | None, option("FILE.pem", "callers need a certificate of this CA")] = None

    def check(self) -> None:
        """Check every value against its type and its limits.

        Raises:
            ConfigError: one does not fit; the message names its option.
        """
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, kind, dec_hook=_convert)
            except msgspec.ValidationError as error:
                expected = str(error).removeprefix("Expected ").partition(", got")[0]
                raise ConfigError(f"{_to_flag(name)}: expected {expected}, got {value!r}") from None
        unused = [name for name in ("log_requests", "leave_seconds", "tls_certificate") if getattr(self, name)]
        if unused and not self.is_guarded:
            raise ConfigError(f"{_to_flag(unused[0])}: the gateway does that: expected no --unguarded")
        self._check_tls()

    def _check_tls(self) -> None:
        """Check that TLS is asked for as a whole."""
        files = {_to_flag(name): getattr(self, name) for name in ("tls_certificate", "tls_key", "tls_client_ca")}
        given = {flag: path for flag, path in files.items() if path is not None}
        for flag in ("--tls-certificate", "--tls-key") if given else ():
            if flag not in given:
                raise ConfigError(f"TLS: expected {flag} with {', '.join(given)}")
        for flag, path in given.items():
            if not path.is_file():
                raise ConfigError(f"TLS: {flag} {path}: there is no such file")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `ServeConfig` that says how it is called on the command line."""
    for name, hint in typing.get_type_hints(ServeConfig, include_extras=True).items():
        kind, *metas = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        for meta in metas:
            parser.add_argument(
                _to_flag(name),
                type=next(part for part in (typing.get_args(kind) or (kind,)) if part is not type(None)),
                default=getattr(ServeConfig, name),
                metavar=meta.extra[METAVAR],
                help=meta.description,
            )


@dataclass(frozen=True)
class GatewayConfig:
    """What one gateway process needs: the server's settings, and Triton's own ports on this machine."""

    serve: ServeConfig
    triton_http_port: int
    triton_grpc_port: int
    triton_metrics_port: int


class Event(enum.StrEnum):
    """What a gateway process tells its launcher."""

    LISTENING = "listening"
    READY = "ready"


@dataclass(frozen=True)
class State:
    """The server as its launcher sees it.

    reason: why it is not ready. broken: models with a dead process. deaths: processes that have died, by model.
    repairs: times that they were replaced; restarts: those of which tritonserver itself had crashed.
    release_number, release_id: of the release that is served. refused_release: the number of one that was to be served
    and failed its checks; refused_reason: how.
    """

    is_ready: bool = False
    reason: str = "the server is starting"
    is_draining: bool = False
    broken: tuple[str, ...] = ()
    deaths: dict[str, int] = field(default_factory=dict)
    repairs: int = 0
    restarts: int = 0
    release_number: int = 0
    release_id: str = ""
    refused_release: int = 0
    refused_reason: str = ""


def encode_line(message: object) -> bytes:
    """Return a message between launcher and gateway: a line of JSON."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


Message = typing.TypeVar("Message")


def decode_line(line: bytes, kind: type[Message]) -> Message:
    """Read a line of `encode_line`.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    return msgspec.json.decode(line, type=kind, dec_hook=_convert)


def _to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _convert(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        value = kind(value)
    return value

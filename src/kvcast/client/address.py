"""Where a server is and how it is reached: what may be written, and what is wrong if nobody ever answered there."""

import contextlib
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from kvcast.protocol.errors import AddressError, NoServerError

Protocol = Literal["grpc", "http"]

# Below the minutes after which routers forget idle connections, above the five seconds that servers allow.
KEEPALIVE_SECONDS = 20.0
SHORTEST_KEEPALIVE, LONGEST_KEEPALIVE = 5, 32767
EXPECTED = {"grpc": "host:port without a scheme", "http": "host:port, http://host:port or https://host:port"}
SCHEME_PORTS = {"http": 80, "https": 443}
NAMES = {"grpc": "gRPC", "http": "HTTP"}
# How each protocol begins; servers answer with a settings frame, and with a status line.
ALPN = {"grpc": "h2", "http": "http/1.1"}
GREETINGS = {
    "grpc": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)),
    "http": b"GET /v2 HTTP/1.1\r\nHost: kvcast\r\nConnection: close\r\n\r\n",
}


@dataclass(frozen=True)
class TlsOptions:
    """Encrypt the connection. Paths of PEM files.

    ca_file: CA of the server's certificate; None is what gRPC, or over HTTP this machine, trusts by itself.
    certificate_file, key_file: the client's own certificate and its key, for a server that asks for one (mutual TLS).
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is sent.

        Raises:
            ValueError: a file is missing, holds something else, or a certificate comes without its key.
        """
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("tls: expected certificate_file and key_file together, got one of them")
        for name, path in vars(self).items():
            if path is not None and not Path(path).is_file():
                raise ValueError(f"tls: expected {name} to be a file, got {str(path)!r}")
        try:
            self.make_context()
        except OSError as error:
            raise ValueError(f"tls: expected PEM files of a CA, or of a certificate and its key: {error}") from error

    def make_context(self) -> ssl.SSLContext:
        """Return what Python's TLS takes."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.certificate_file is not None:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context


@dataclass(frozen=True)
class Address:
    """A server's address as it was written (`text`), in its parts, and how connections to it are made."""

    text: str
    protocol: Protocol
    host: str
    port: int
    tls: TlsOptions | None
    keepalive_seconds: float

    @classmethod
    def parse(
        cls,
        text: str,
        protocol: Protocol,
        tls: TlsOptions | None = None,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
    ) -> Self:
        """Read an address.

        Raises:
            ValueError: it is none, it does not fit to the protocol or to `tls`, or the keepalive is too short.
        """
        if not keepalive_seconds >= SHORTEST_KEEPALIVE:
            raise ValueError(
                f"keepalive_seconds: expected {SHORTEST_KEEPALIVE} or more (servers end connections that ask more "
                f"often; math.inf: never), got {keepalive_seconds}"
            )
        scheme, has_scheme, rest = text.rpartition("://")
        try:
            parts = urlsplit(f"//{rest}")
            host, port = parts.hostname or "", parts.port or SCHEME_PORTS.get(scheme)
            is_host = not parts.path.strip("/") and (":" in host or re.fullmatch(r"[\w.-]+", host))
        except ValueError:
            host, port, is_host = "", None, None
        fits = not has_scheme or (protocol == "http" and scheme in SCHEME_PORTS)
        if not (fits and is_host and port) or set(rest) & set("@?#"):
            hint = ": its HTTP port needs protocol='http'" if protocol == "grpc" and scheme in SCHEME_PORTS else ""
            raise ValueError(
                f"address: expected {EXPECTED[protocol]} over {NAMES[protocol]}, port 1 to 65535, got {text!r}{hint}"
            )
        if tls is not None and scheme == "http":
            raise ValueError(f"tls: expected https:// or no scheme, got {text!r}")
        return cls(text, protocol, host, port, tls or (TlsOptions() if scheme == "https" else None), keepalive_seconds)

    @property
    def netloc(self) -> str:
        """`host:port`, as libraries take it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def socket_options(self) -> list[tuple[int, int, int]]:
        """What has the kernel look after a silent TCP connection, as `setsockopt` takes it."""
        if self.keepalive_seconds > LONGEST_KEEPALIVE:
            return []
        times = {socket.TCP_KEEPIDLE: int(self.keepalive_seconds), socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 5}
        options = [(socket.IPPROTO_TCP, name, value) for name, value in times.items()]
        return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options]

    def diagnose(self, seconds: float) -> AddressError | None:
        """Return what is wrong here, None if that cannot be told; each look takes at most `seconds`."""
        try:
            return self._diagnose(seconds)
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason
            return AddressError(
                f"{self.text}: no TLS ({why}): is it served with TLS, by this name, are these its files?"
            )
        except (TimeoutError, ConnectionResetError):
            return None
        except OSError as error:
            return NoServerError(
                f"{self.text}: no server ({error.strerror or error}): is it up, and is this its address and port?"
            )

    def _diagnose(self, seconds: float) -> AddressError | None:
        other: Protocol = "http" if self.protocol == "grpc" else "grpc"
        context = self.tls.make_context() if self.tls else None
        answer = self._greet(self.protocol, context, seconds)
        if not answer and context is None and self._takes_tls(seconds):
            return AddressError(f"{self.text}: expects TLS: give tls=TlsOptions(…) (kvcast rank: --tls-ca)")
        if not answer and context is not None:
            answer = self._greet(other, context, seconds)
            if not answer:
                hint = "does it want a certificate of ours (certificate_file, key_file), and is it up?"
                return NoServerError(f"{self.text}: hangs up after the TLS handshake: {hint}")
        is_grpc = answer[3:4] == b"\4"  # a server of HTTP/2 begins with its settings
        if not answer or is_grpc == (self.protocol == "grpc"):
            return None
        return AddressError(
            f"{self.text}: this port does not speak {NAMES[self.protocol]}: give another, or protocol={other!r} if it "
            f"is that of {NAMES[other]} (kvcast rank: --protocol {other})"
        )

    def _greet(self, protocol: Protocol, context: ssl.SSLContext | None, seconds: float) -> bytes:
        """Return how a server begins its answer to a protocol, empty if it hangs up."""
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(socket.create_connection((self.host, self.port), seconds))
            if context is not None:
                context.set_alpn_protocols([ALPN[protocol]])
                stream = stack.enter_context(context.wrap_socket(stream, server_hostname=self.host))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
                stream.sendall(GREETINGS[protocol])
                return stream.recv(9)
        return b""

    def _takes_tls(self, seconds: float) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing of ours is sent
        with contextlib.suppress(OSError):
            return self._greet(self.protocol, context, seconds) != b""
        return False

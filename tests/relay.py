"""A TCP relay on this machine that can drop its connections as a network does: silently."""

import contextlib
import socket
import threading
from typing import Self

CHUNK_BYTES = 1 << 16


class Relay:
    """Passes bytes on to `host:port`; after `drop` it swallows those of the connections that it has by then."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._dropped: set[socket.socket] = set()
        self.count = 0

    def drop(self) -> None:
        """Swallow from now on what comes over the connections that there are."""
        self._dropped.update(self._sockets)

    def __enter__(self) -> Self:
        """Listen."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Hang up."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                self._sockets += [caller, server]
                self.count += 1
                for source, target in ((caller, server), (server, caller)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if source not in self._dropped:
                    target.sendall(data)
            if source not in self._dropped:
                target.shutdown(socket.SHUT_WR)

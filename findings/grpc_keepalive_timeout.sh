#!/usr/bin/env bash
# gRPC's keepalive_timeout_ms does not end a connection whose keepalive ping stays unanswered; ping_timeout_ms does.
#
# doc/keepalive.md of gRPC says that a connection is closed if a ping is not answered within GRPC_ARG_KEEPALIVE_TIMEOUT_MS.
# Seen with grpcio 1.85.1, Python 3.11, Linux; a relay on this machine swallows all bytes once a first call was answered,
# as a network that drops a connection silently (TCP itself is answered, so TCP_USER_TIMEOUT does not help):
#
#   channel options                                          a call with a deadline of 90 s ends after
#   keepalive_time 5 s, keepalive_timeout 5 s                60 s: UNAVAILABLE, "ping timeout"
#   the same, and grpc.http2.ping_timeout_ms 5 s             5 s: UNAVAILABLE, "ping timeout"
#
# The script takes a minute and a half, and fails if either changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grpcio==1.85.1
cat > "$folder/observe.py" <<'PYTHON'
import socket
import threading
import time
from concurrent import futures

import grpc

METHOD = "/example.Echo/Echo"
KEEPALIVE = [("grpc.keepalive_time_ms", 5000), ("grpc.keepalive_timeout_ms", 5000)]


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda message, rpc: message)


def pump(source, target, swallows):
    while data := source.recv(65536):
        if not swallows.is_set():
            target.sendall(data)


def relay(listener, port, swallows):
    caller, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))
    for pair in ((caller, server), (server, caller)):
        threading.Thread(target=pump, args=(*pair, swallows), daemon=True).start()


def observe(port, options):
    """Return the seconds after which a call on a dropped connection ended, and how."""
    swallows = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=relay, args=(listener, port, swallows), daemon=True).start()
        with grpc.insecure_channel(f"127.0.0.1:{listener.getsockname()[1]}", options) as channel:
            echo = channel.unary_unary(METHOD)
            assert echo(b"there", timeout=10) == b"there"
            swallows.set()
            started = time.monotonic()
            try:
                echo(b"gone", timeout=90)
            except grpc.RpcError as error:
                return time.monotonic() - started, error.code().name, error.details()


server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(Echo(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print("grpcio", grpc.__version__)
for name, options, least, most in (
    ("keepalive_timeout alone", KEEPALIVE, 50, 85),
    ("and ping_timeout", [*KEEPALIVE, ("grpc.http2.ping_timeout_ms", 5000)], 3, 15),
):
    seconds, code, details = observe(port, options)
    print(f"{name:25} {seconds:5.1f} s  {code}: {details}")
    assert code == "UNAVAILABLE" and least <= seconds <= most, "this has changed"
server.stop(None)
PYTHON
"$folder/venv/bin/python" "$folder/observe.py"

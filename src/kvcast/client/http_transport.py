"""One inference over HTTP: tritonclient writes and reads the bodies, urllib3 and aiohttp carry them."""

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import aiohttp
import numpy as np
import urllib3
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

from kvcast.client.address import Address
from kvcast.client.transport import (
    AsyncNetworkTransport,
    Call,
    NetworkTransport,
    Tensors,
    limit_queueing,
    make_error,
    miss_deadline,
    miss_server,
    read_outputs,
)
from kvcast.protocol.errors import REASON_FIELD, KvcastError, ServerFaultError

# Connections of one client: as many requests as may be in flight at once.
CONNECTIONS = 64
HEADER_LENGTH = "Inference-Header-Content-Length"
CHUNK_BYTES = 1 << 16


def make_path(call: Call) -> str:
    """Return the path of a call."""
    return f"/v2/models/{call.model}/infer"


def make_body(call: Call, deadline: float) -> tuple[bytes, dict[str, str]]:
    """Return the body of a call, with binary data, and its headers."""
    inputs = []
    for name, array in call.inputs.items():
        inputs.append(InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
    body, header_length = InferenceServerClient.generate_request_body(
        inputs,
        outputs=[InferRequestedOutput(name) for name in call.outputs],
        timeout=limit_queueing(deadline),
        parameters=dict(call.parameters) or None,
    )
    headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
    return bytes(body), {**headers, **dict(call.metadata)}


def read_reply(status: int, headers: Any, content: bytes, call: Call, address: str, deadline: float) -> Tensors:
    """Return the outputs in a reply.

    Raises:
        KvcastError: the reply is an error, or lacks an output.
    """
    if status != 200:
        message, reason = read_error(content)
        raise make_error(status, reason, message or f"HTTP status {status}", address, deadline)
    length = headers.get(HEADER_LENGTH)
    reply = InferenceServerClient.parse_response_body(content, header_length=None if length is None else int(length))
    return read_outputs(reply, call.outputs)


def read_error(content: bytes) -> tuple[str, str]:
    """Return message and reason of an error; what is not JSON, as a proxy's page, is the message itself."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError):
        table = json.loads(text)
        if isinstance(table, dict) and isinstance(table.get("error"), str):
            return table["error"], str(table.get(REASON_FIELD, ""))
    return text.strip(), ""


def translate(error: Exception, address: str, deadline: float) -> tuple[KvcastError, bool]:
    """Return the error of our own that says who has to act, and whether the server has answered."""
    if isinstance(error, KvcastError):
        return error, True
    # urllib3 calls a refused connection a kind of timeout.
    is_refused = isinstance(error, urllib3.exceptions.NewConnectionError)
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError) and not is_refused:
        return miss_deadline(address, deadline), False
    if isinstance(error, OSError | aiohttp.ClientError | urllib3.exceptions.HTTPError):
        return miss_server(address, str(error)), False
    return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})"), False


def _read(response: urllib3.BaseHTTPResponse, until: float) -> bytes:
    """Return the body; urllib3's timeout is that of each read, this one is that of all."""
    content = bytearray()
    connection: Any = response.connection
    while True:
        left = until - time.monotonic()
        if left <= 0:
            response.close()
            raise TimeoutError
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(left)
        chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            response.release_conn()
            return bytes(content)
        content += chunk


def _open_pool(address: Address) -> urllib3.HTTPConnectionPool:
    options = [*urllib3.connection.HTTPConnection.default_socket_options, *address.socket_options]
    if address.tls is None:
        return urllib3.HTTPConnectionPool(address.host, address.port, maxsize=CONNECTIONS, socket_options=options)
    context = address.tls.make_context()
    return urllib3.HTTPSConnectionPool(
        address.host, address.port, maxsize=CONNECTIONS, socket_options=options, ssl_context=context
    )


def _open_session(address: Address) -> aiohttp.ClientSession:
    def make_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        made = socket.socket(*info[:3])
        for option in address.socket_options:
            made.setsockopt(*option)
        return made

    context = address.tls.make_context() if address.tls else True
    return aiohttp.ClientSession(
        f"{'https' if address.tls else 'http'}://{address.netloc}",
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=context, socket_factory=make_socket),
        timeout=aiohttp.ClientTimeout(total=None),
    )


class SyncTransport(NetworkTransport):
    """A pool of connections, which all threads share."""

    open_session = staticmethod(_open_pool)
    translate = staticmethod(translate)

    def send(self, session: urllib3.HTTPConnectionPool, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        body, headers = make_body(call, deadline)
        until = time.monotonic() + deadline
        response = session.urlopen(
            "POST",
            make_path(call),
            body,
            headers,
            retries=False,
            timeout=urllib3.Timeout(total=deadline),
            preload_content=False,
        )
        content = _read(response, until)
        return read_reply(response.status, response.headers, content, call, self.address.text, deadline)


class AsyncTransport(AsyncNetworkTransport):
    """The same for asyncio."""

    open_session = staticmethod(_open_session)
    translate = staticmethod(translate)

    async def send(self, session: aiohttp.ClientSession, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        body, headers = make_body(call, deadline)
        async with (
            asyncio.timeout(deadline),
            session.post(make_path(call), data=body, headers=headers, allow_redirects=False) as response,
        ):
            content = await response.read()
        return read_reply(response.status, response.headers, content, call, self.address.text, deadline)

"""One inference over HTTP: tritonclient writes and reads the bodies, urllib3 and aiohttp carry them."""

import asyncio
import contextlib
import json
import time
from typing import Any

import aiohttp
import numpy as np
import urllib3
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

from kvcast.client.transport import (
    LONGEST_SECONDS,
    AsyncTransport,
    Call,
    Tensors,
    Transport,
    limit_queueing,
    make_error,
    miss_deadline,
    miss_server,
    read_outputs,
)
from kvcast.protocol.errors import REASON_FIELD, KvcastError, ServerFaultError
from kvcast.protocol.routing import ROUTING_HEADER

# Connections of one client: as many requests as may be in flight at once.
CONNECTIONS = 64
HEADER_LENGTH = "Inference-Header-Content-Length"
CHUNK_BYTES = 1 << 16


class HttpTransport(Transport):
    """A pool of connections, which all threads share."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pool = urllib3.connectionpool.connection_from_url(f"http://{address}", maxsize=CONNECTIONS)

    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        body, headers = make_body(call, deadline)
        deadline = min(deadline, LONGEST_SECONDS)
        until = time.monotonic() + deadline
        try:
            response = self._pool.urlopen(
                "POST",
                make_path(call),
                body,
                headers,
                retries=False,
                timeout=urllib3.Timeout(total=deadline),
                preload_content=False,
            )
            content = _read(response, until)
            return read_reply(response.status, response.headers, content, call, self._address, deadline)
        except Exception as error:
            raise translate(error, self._address, deadline) from error

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class AsyncHttpTransport(AsyncTransport):
    """The same for asyncio."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session: aiohttp.ClientSession | None = None

    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        body, headers = make_body(call, deadline)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=aiohttp.ClientTimeout(total=None)
            )
        try:
            async with (
                asyncio.timeout(deadline),
                self._session.post(f"http://{self._address}{make_path(call)}", data=body, headers=headers) as response,
            ):
                content = await response.read()
            return read_reply(response.status, response.headers, content, call, self._address, deadline)
        except Exception as error:
            raise translate(error, self._address, deadline) from error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


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
    if call.routing_key is not None:
        headers[ROUTING_HEADER] = call.routing_key
    return bytes(body), headers


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


def translate(error: Exception, address: str, deadline: float) -> KvcastError:
    """Return the error of our own that says who has to act."""
    if isinstance(error, KvcastError):
        return error
    # urllib3 calls a refused connection a kind of timeout.
    is_refused = isinstance(error, urllib3.exceptions.NewConnectionError)
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError) and not is_refused:
        return miss_deadline(address, deadline)
    if isinstance(error, OSError | aiohttp.ClientError | urllib3.exceptions.HTTPError):
        return miss_server(address, str(error))
    return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})")


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

#!/usr/bin/env bash
# tritonclient.http.aio (2.51.0 and 2.73.0) asks for compressed replies and cannot read them, but for inference.
#
# Its aiohttp session sends aiohttp's own `Accept-Encoding: gzip, deflate, …` with every request and has
# `auto_decompress=False`; only replies to inference are then decompressed by hand. tritonserver 2.51 compresses nothing
# else, so it is not noticed until a proxy in front does. Guess before looking: the client decompresses all that it
# accepts, or accepts nothing.
#
#   server that never compresses: metadata read
#   server that compresses where that is accepted: UnicodeDecodeError, at get_model_metadata
#
# Exit status 0: as described. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > observe.py <<'PYTHON'
import asyncio
from importlib.metadata import version

import tritonclient.http.aio
from aiohttp import web

print("tritonclient", version("tritonclient"), "aiohttp", version("aiohttp"))


async def observe(compresses):
    """Return what the client makes of a server's metadata, and whether it asked for gzip."""
    asked = []

    async def answer(request):
        asked.append("gzip" in request.headers.get("Accept-Encoding", ""))
        response = web.json_response({"name": "double", "versions": ["1"], "inputs": [], "outputs": []})
        if compresses and asked[-1]:
            response.enable_compression(web.ContentCoding.gzip)
        return response

    application = web.Application()
    application.router.add_get("/v2/models/double", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            got = (await client.get_model_metadata("double"))["name"]
    except UnicodeDecodeError as error:
        got = type(error).__name__
    await runner.cleanup()
    return got, asked


plain, compressed = (asyncio.run(observe(each)) for each in (False, True))
print("server that never compresses:", plain)
print("server that compresses where that is accepted:", compressed)
raise SystemExit((plain, compressed) != (("double", [True]), ("UnicodeDecodeError", [True])))
PYTHON
for version in 2.51.0 2.73.0; do
    python3.11 -m venv "venv-$version"
    "venv-$version/bin/pip" install --quiet "tritonclient[http]==$version" 'aiohttp==3.14.5' 'numpy==1.26.4'
    "venv-$version/bin/python" observe.py
done

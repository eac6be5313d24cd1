"""Triton's administration, over its own HTTP port on this machine: health, index, load and unload, a golden request."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import urllib3

from kvcast.protocol.golden import Golden
from kvcast.protocol.tensors import CANDIDATES, HISTORY, SCORES
from kvcast.server.installation import ServerError

# Opening a model checks its files' hashes and runs it: minutes for gigabytes on a slow disk.
LOAD_SECONDS = 900
ASK_SECONDS = 5


class Admin:
    """A client of one tritonserver."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str]) -> None:
        """Use this address, and the headers that open the restricted APIs."""
        # No connection outlives its request: Triton may restart between two.
        headers = {**headers, "Connection": "close"}
        self._pool = urllib3.HTTPConnectionPool(host, port, headers=headers, retries=False, maxsize=4)

    def is_ready(self) -> bool:
        """Whether Triton reports ready; it does so even if a model process has died."""
        reply = self._ask("GET", "/v2/health/ready")
        return reply is not None and reply.status == 200

    def read_version(self) -> tuple[int, ...]:
        """Return Triton's version.

        Raises:
            ServerError: it does not say.
        """
        return tuple(map(int, re.findall(r"\d+", self._order("version", "/v2", method="GET")["version"])))

    def find_missing(self, models: list[str]) -> list[str]:
        """Return those of the models that have no version that is ready."""
        reply = self._ask("POST", "/v2/repository/index")
        entries = reply.json() if reply is not None and reply.status == 200 else []
        ready = {entry["name"] for entry in entries if entry.get("state") == "READY"}
        return [name for name in models if name not in ready]

    def load(self, model: str) -> None:
        """Load a model as the repository has it; if that fails, the version that was served before still is.

        Raises:
            ServerError: it cannot be loaded; what was served before still is.
        """
        self._order(f"load {model}", f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        """Unload a model.

        Raises:
            ServerError: Triton refuses.
        """
        self._order(f"unload {model}", f"/v2/repository/models/{model}/unload")

    def check_golden(self, model: str, golden: Golden) -> None:
        """Send the golden request; raises ArtefactError if the scores are wrong."""
        inputs = [_to_json(HISTORY.name, golden.history[None]), _to_json(CANDIDATES.name, golden.candidates[None])]
        body = {"inputs": inputs, "outputs": [{"name": SCORES.name}]}
        reply = self._order(f"golden request to {model}", f"/v2/models/{model}/infer", body)
        (scores,) = (output["data"] for output in reply["outputs"] if output["name"] == SCORES.name)
        golden.check(np.array(scores, np.float32))

    def _order(self, what: str, path: str, body: Any = None, method: str = "POST") -> Any:
        """Return the body of a reply; raises ServerError if there is none, or an error."""
        reply = self._ask(method, path, body, LOAD_SECONDS)
        if reply is None:
            raise ServerError(f"{what}: no answer")
        if reply.status != 200:
            raise ServerError(f"{what}: {read_error(reply) or 'no answer'}")
        return reply.json() if reply.data else None

    def _ask(
        self, method: str, path: str, body: Any = None, seconds: float = ASK_SECONDS
    ) -> urllib3.BaseHTTPResponse | None:
        try:
            return self._pool.request(method, path, json=body, timeout=seconds)
        except urllib3.exceptions.HTTPError:
            return None


def read_error(reply: urllib3.BaseHTTPResponse) -> str:
    """Return the text of an error reply, empty if there is none."""
    try:
        return str(reply.json()["error"])
    except (ValueError, TypeError, KeyError):
        return ""


def _to_json(name: str, ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"name": name, "shape": list(ids.shape), "datatype": "INT64", "data": ids.reshape(-1).tolist()}

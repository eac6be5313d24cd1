"""Triton's administration, over its own HTTP port on this machine: health, index, load and unload, a golden request."""

import http.client
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcast.protocol.golden import Golden
from kvcast.protocol.tensors import CANDIDATES, HISTORY, SCORES
from kvcast.server.installation import ServerError

# Opening a model checks its files' hashes and runs it: minutes for gigabytes on a slow disk.
LOAD_SECONDS = 900
ASK_SECONDS = 5


class Admin:
    """Asks one tritonserver."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str]) -> None:
        """Take note of where it is, and of the headers that open what is restricted."""
        self._host, self._port, self._headers = host, port, dict(headers)

    def is_ready(self) -> bool:
        """Whether Triton calls itself ready; that it is true is another matter."""
        return self._ask("GET", "/v2/health/ready")[0] == 200

    def find_missing(self, models: list[str]) -> list[str]:
        """Return those of the models that have no version that is ready."""
        status, body = self._ask("POST", "/v2/repository/index")
        entries = json.loads(body) if status == 200 else []
        ready = {entry["name"] for entry in entries if entry.get("state") == "READY"}
        return [name for name in models if name not in ready]

    def load(self, model: str) -> None:
        """Load what the repository holds of a model: new versions beside the old, changed ones in their place.

        Raises:
            ServerError: it cannot be loaded; what was served before still is.
        """
        self._order("load", model)

    def unload(self, model: str) -> None:
        """Unload a model.

        Raises:
            ServerError: Triton refuses.
        """
        self._order("unload", model)

    def check_golden(self, model: str, golden: Golden) -> None:
        """Ask the golden request.

        Raises:
            ServerError: there is no answer.
            ArtefactError: the scores are wrong.
        """
        inputs = [_to_json(HISTORY.name, golden.history[None]), _to_json(CANDIDATES.name, golden.candidates[None])]
        body = json.dumps({"inputs": inputs, "outputs": [{"name": SCORES.name}]})
        status, reply = self._ask("POST", f"/v2/models/{model}/infer", body, LOAD_SECONDS)
        if status != 200:
            raise ServerError(f"golden request to {model}: {read_error(reply) or 'no answer'}")
        (scores,) = (output["data"] for output in json.loads(reply)["outputs"] if output["name"] == SCORES.name)
        golden.check(np.array(scores, np.float32))

    def _order(self, what: str, model: str) -> None:
        status, body = self._ask("POST", f"/v2/repository/models/{model}/{what}", None, LOAD_SECONDS)
        if status != 200:
            raise ServerError(f"{what} {model}: {read_error(body) or 'no answer'}")

    def _ask(self, method: str, path: str, body: str | None = None, seconds: float = ASK_SECONDS) -> tuple[int, bytes]:
        """Return status and body of one HTTP request; status 0 where there is no answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        try:
            connection.request(method, path, body, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()


def read_error(body: bytes) -> str:
    """Return the text of an error reply, empty if there is none."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return ""


def _to_json(name: str, ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"name": name, "shape": list(ids.shape), "datatype": "INT64", "data": ids.reshape(-1).tolist()}

"""Requests as perf_analyzer reads them (`--input-data`): each user its own, where its random ones repeat one user."""

import json
from collections.abc import Sequence
from pathlib import Path

from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import CANDIDATES, HISTORY


def write_perf_input(requests: Sequence[RankRequest], path: Path) -> None:
    """Write requests, INT64, shapes without the batch axis.

    Raises:
        OSError: the file cannot be written.
    """
    entries = [
        {
            name: {"content": ids.ravel().tolist(), "shape": list(ids.shape)}
            for name, ids in ((HISTORY.name, request.history), (CANDIDATES.name, request.candidates))
        }
        for request in requests
    ]
    path.write_text(json.dumps({"data": entries}))

"""Triton adapter of `ranker_full`; the work is in `kvcast.runtime`."""

from typing import Any

import triton_python_backend_utils as pb_utils

from kvcast.runtime import FullRanker, load_model, serve_requests


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the exported artefact beside this file."""
        self.loaded = load_model(pb_utils, args, FullRanker)

    def execute(self, requests: list[Any]) -> None:
        """Answer each request, as soon as its reply is there."""
        serve_requests(pb_utils, requests, self.loaded)

"""Triton adapter of `ranker_full`; the work is in `kvcast.serving`."""

from typing import Any

import triton_python_backend_utils as pb_utils

from kvcast.serving import FullRanker, start_model


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the exported artefact beside this file."""
        self.service = start_model(pb_utils, args, FullRanker)

    def execute(self, requests: list[Any]) -> None:
        """Take requests in; each is answered as soon as its reply is there."""
        self.service.submit(requests)

    def is_ready(self) -> bool:
        """Whether an inference would be answered: Triton 2.72 asks, 2.51 does not."""
        return self.service.is_ready()

    def finalize(self) -> None:
        """Answer what has come in, and stop."""
        self.service.close()

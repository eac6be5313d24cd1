"""Starts tritonserver and its gateway on a model repository, repairs both, switches releases, stops cleanly.

`installation` finds the binary, `repository` and `releases` determine what is served, `view` is the repository that
Triton sees, `triton_process` and `gateway_process` run the two processes, `supervisor` watches them, `launcher`
combines all of it.
"""

from kvcast.gateway.config import ServeConfig
from kvcast.server.installation import ServerError
from kvcast.server.launcher import TritonServer

__all__ = ["ServeConfig", "ServerError", "TritonServer"]

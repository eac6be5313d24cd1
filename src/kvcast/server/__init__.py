"""Starts tritonserver and its gateway on a model repository, keeps both whole, switches releases, stops cleanly.

`installation` finds the binary, `repository` and `releases` know what is to be served, `view` is what Triton sees of
it, `triton_process` and `gateway_process` run the two, `supervisor` watches them, `launcher` puts it all together. The
room knows nothing of what the models compute.
"""

from kvcast.gateway.config import ServeConfig
from kvcast.server.installation import ServerError
from kvcast.server.launcher import TritonServer

__all__ = ["ServeConfig", "ServerError", "TritonServer"]

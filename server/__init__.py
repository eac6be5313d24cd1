"""Starts the real tritonserver on a model repository, waits until it can answer, and stops it cleanly.

`installation` finds the binary and what it needs, `repository` checks what is to be served, `launcher` runs the
process. Standard library only, but for the contract's manifest: the room knows nothing of what the models compute.
"""

from kvcast.server.installation import ServerError
from kvcast.server.launcher import ServerSettings, TritonServer

__all__ = ["ServerError", "ServerSettings", "TritonServer"]

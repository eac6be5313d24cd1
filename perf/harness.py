"""A server of an experiment's own: on free ports, with the models and the cache that it measures."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvcast.server import ServerSettings, TritonServer
from kvcast.server.repository import find_free_ports
from kvcast.serving.options import CACHE_BUDGET


@contextlib.contextmanager
def serve_own(
    settings: ServerSettings,
    models: Sequence[str],
    *,
    cache_megabytes: float | None = None,
    is_guarded: bool = False,
) -> Iterator[TritonServer]:
    """Serve an exported repository as long as the block runs.

    Args:
        settings: those of the whole run.
        models: what is served.
        cache_megabytes: of each user KV cache, 0 for none; None: as the repository says.
        is_guarded: whether callers ask the guard.
    """
    http, grpc, metrics = find_free_ports(3)
    parameters = settings.parameters if cache_megabytes is None else {CACHE_BUDGET: f"{cache_megabytes:g}"}
    own = replace(
        settings,
        models=list(models),
        parameters=parameters,
        is_guarded=is_guarded,
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
    )
    with TritonServer(own) as server:
        yield server

"""The release fingerprint: one hash of everything that decides a score."""

import dataclasses
import hashlib
import inspect
import json
import sys
from typing import Any

from kvcast.networks import attention, interface, masks
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.manifest import CONTRACT_VERSION


def fingerprint_release(network: RankingNetwork) -> str:
    """Return the SHA-256 (hex) over contract version, configuration, KV layout, the network's code, and every weight.

    The code is in it because two networks with the same weights can compute different things: KV of the one must not be
    fused by the other. It is the code of the files in which the network's class, its bases and its parts are written.
    """
    settings = [_list_settings(network.config), dataclasses.asdict(network.kv_layout)]
    digest = hashlib.sha256(f"kvcast contract {CONTRACT_VERSION}\n{json.dumps(settings, sort_keys=True)}\n".encode())
    for source in (inspect.getsource(attention), inspect.getsource(masks), *_list_sources(network)):
        digest.update(source.encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _list_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration but for where its files lie; options only if there are any."""
    settings = config.list_settings()
    if not config.network.options:
        del settings["network"]["options"]
    return settings


def _list_sources(network: RankingNetwork) -> list[str]:
    """Return the text of the family's own file first, then of others that its bases and parts are written in."""
    classes = [each for part in network.modules() for each in type(part).__mro__]
    names = dict.fromkeys([type(network).__module__, *sorted({each.__module__ for each in classes})])
    known = {attention.__name__, interface.__name__, masks.__name__}
    libraries = {"abc", "builtins", "torch", "typing"}
    own, *others = [
        inspect.getsource(sys.modules[name])
        for name in names
        if name not in known and name.partition(".")[0] not in libraries
    ]
    return [own, *sorted(others)]  # by their text: where a module lies decides no score

"""The release fingerprint: one hash of everything that decides a score."""

import dataclasses
import hashlib
import inspect
import json
import sys

from kvcast.contract.manifest import CONTRACT_VERSION
from kvcast.network import attention, masks
from kvcast.network.interface import RankingNetwork


def fingerprint_release(network: RankingNetwork) -> str:
    """Return the SHA-256 (hex) over contract version, configuration, KV layout, the network's code, and every weight.

    The code is in it because two networks with the same weights can compute different things: KV of the one must not be
    fused by the other.
    """
    settings = [dataclasses.asdict(network.config), dataclasses.asdict(network.kv_layout)]
    digest = hashlib.sha256(f"kvcast contract {CONTRACT_VERSION}\n{json.dumps(settings, sort_keys=True)}\n".encode())
    for module in (attention, masks, sys.modules[type(network).__module__]):
        digest.update(inspect.getsource(module).encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()

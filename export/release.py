"""The release fingerprint: one hash of everything that decides a score."""

import dataclasses
import hashlib
import json
from pathlib import Path

from kvcast.contract.manifest import CONTRACT_VERSION
from kvcast.network.interface import RankingNetwork


def fingerprint_release(network: RankingNetwork) -> str:
    """Return the SHA-256 (hex) over contract version, configuration, and every weight's name, shape and bytes."""
    config = json.dumps(dataclasses.asdict(network.config), sort_keys=True)
    digest = hashlib.sha256(f"kvcast contract {CONTRACT_VERSION}\n{config}\n".encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

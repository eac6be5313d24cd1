"""The manifest beside each model.onnx: what the artefact is, what it accepts, what was proved of it.

Export writes it, the models rely on nothing that it does not say, and clients receive it as JSON from the server.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from kvcast.protocol.config import Option
from kvcast.protocol.decoding import decode_json, read_file
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.schema import FeatureSchema, Field, KVLayout, Limits, Workload

MANIFEST_FILE = "manifest.json"
ONNX_FILE = "model.onnx"
# The weights of all models of a release: one file, with a name in the folder of each.
WEIGHTS_FILE = "weights.data"
# In a repository: which releases were published into it, and which of them is served (server/releases.py).
RELEASES_FILE = "releases.json"
# Raised whenever a tensor, its meaning or this file changes, or what networks/attention.py and networks/masks.py
# compute, so that artefacts of both sides cannot be mixed.
CONTRACT_VERSION = 5
# Where the ONNX file itself repeats the release, so that a swapped file is noticed.
RELEASE_METADATA_KEY = "kvcast.release"


class Dims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the network: M layers, H heads, model width d, T tokens of a candidate."""

    layers: int
    heads: int
    width: int
    candidate_tokens: int


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the proofs of this export measured: largest absolute differences of scores (1 = one logit).

    `graphs` is that between the graphs and the network, of scores and user KV, relative above 1; `torch` and `onnx` are
    those between cached path and monolith, in the network and through the graphs.
    `undirected_difference` is the negative control: the largest difference of scores
    between the undirected and the target-blind mask. `limits` is the release with whose weights requests at the limits
    were proved of these graphs: its own, or an earlier one where that takes longer than all other proofs.
    """

    graphs: float
    torch: float
    onnx: float
    undirected_difference: float
    limits: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One exported model. `release` is a hash (hex) of what decides a score, `kv_id` of what user KV depends on.

    `network` is the family as the TOML names it, and `network_options` are its own options.
    `files` maps the name of each artefact file beside the manifest to its SHA-256 (hex).
    """

    model: str
    config: str
    network: str
    release: str
    kv_id: str
    history_fields: tuple[Field, ...]
    candidate_fields: tuple[Field, ...]
    limits: Limits
    workload: Workload
    dims: Dims
    user_kv: KVLayout
    dtype: str
    opset: int
    versions: dict[str, str]
    parity: Parity
    files: dict[str, str]
    contract_version: int = CONTRACT_VERSION
    network_options: dict[str, Option] = {}

    @property
    def schema(self) -> FeatureSchema:
        """The feature fields of both sides."""
        return FeatureSchema(self.history_fields, self.candidate_fields)

    def to_json(self) -> str:
        """Return the manifest as indented JSON; without `network_options` where there are none."""
        table: dict[str, Any] = msgspec.to_builtins(self)
        if not self.network_options:
            del table["network_options"]
        return json.dumps(table, indent=2) + "\n"


class _Version(msgspec.Struct, frozen=True):
    contract_version: int


def parse_manifest(text: str) -> Manifest:
    """Read a manifest from its JSON; raises ArtefactError if it is none, or of another contract version."""
    version = decode_json(text, _Version, "manifest", ArtefactError).contract_version
    if version != CONTRACT_VERSION:
        raise ArtefactError(f"manifest: expected contract version {CONTRACT_VERSION}, got {version}: export again")
    return decode_json(text, Manifest, "manifest", ArtefactError)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in `folder`; raises ArtefactError if there is none that can be used."""
    return parse_manifest(read_file(folder / MANIFEST_FILE, "run the export first", ArtefactError))


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes, as `Manifest.files` holds it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system has none: the models of a release share their weights."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

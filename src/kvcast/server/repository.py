"""What must exist before a server starts: exported models of the configuration asked for, and free ports.

Each check fails with one sentence and its remedy, instead of a server that dies with a page of log.
"""

import errno
import socket
import subprocess
import sys
from pathlib import Path

from kvcast.protocol.config import load_config
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.manifest import Manifest, read_manifest
from kvcast.protocol.tensors import DOC_FUSION, USER_ENCODER
from kvcast.server.installation import ServerError
from kvcast.server.releases import ReleaseStore
from kvcast.server.view import find_models


def check_repository(repository: Path, models: list[str], config: str | None) -> Manifest:
    """Check that every model is exported, all of one release, of `config` if that is given; return a manifest.

    Raises:
        ServerError: one is unknown, missing, or of another release or configuration.
    """
    store = ReleaseStore(repository)
    names = expand_models(models)
    number = store.find_served(names)
    manifests = [read_manifest(store.find_folder(name, number)) for name in names]
    if len({manifest.release for manifest in manifests}) > 1:
        of_each = ", ".join(f"{manifest.model} {manifest.release[:12]}" for manifest in manifests)
        raise ServerError(f"{repository} holds models of different releases ({of_each}): export again")
    manifest = manifests[0]
    if config is not None and manifest.config != config:
        raise ServerError(
            f"{repository} holds the export of {manifest.config!r}, not of {config!r}: "
            f"run `make export CONFIG={config}`, or serve what is there with CONFIG={manifest.config}"
        )
    return manifest


def read_config_name(config: str | None) -> str | None:
    """Return a configuration's name: the argument itself, or the `name` in a TOML file."""
    return load_config(config).name if config is not None and config.endswith(".toml") else config


def ensure_exported(repository: Path, models: list[str], config: str) -> None:
    """Export `config` (name or TOML file) into the repository, unless all of `models` are there already.

    Raises:
        ServerError: the export failed; it has said why on standard error.
    """
    try:
        check_repository(repository, models, read_config_name(config))
    except KvcastError:
        print(f"{repository} has no export of {config} yet; making it", flush=True)
        command = [sys.executable, "-m", "kvcast.export", "--config", config, "--repository", str(repository)]
        if subprocess.run(command, check=False).returncode:  # it has printed why
            raise ServerError(f"{config} could not be exported") from None


def expand_models(models: list[str]) -> list[str]:
    """Return the models that hold an artefact, for models by name, ensembles replaced by their steps.

    Raises:
        ServerError: there is no such model, or none was named.
    """
    return [model.name for model in find_models(models) if not model.steps]


def count_shared_memory(manifest: Manifest, models: list[str]) -> int:
    """Return bytes of shared memory for a model process: for requests, and for user KV where models pass it on.

    A region grows on demand, which makes that request several times slower, and never shrinks: so it starts at the
    size of the workload. It is allocated at once, so that is two requests' KV, not a full batch's.
    """
    moves_kv = any(name in (USER_ENCODER.name, DOC_FUSION.name) for name in expand_models(models))
    return (2 * manifest.user_kv.bytes_of(manifest.workload.history) if moves_kv else 0) + (16 << 20)


def check_port(host: str, port: int, purpose: str, variable: str) -> None:
    """Check that a port can be bound.

    Raises:
        ServerError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ServerError(f"cannot bind {purpose} to {host}:{port}: {error.strerror}") from error
            raise ServerError(
                f"port {port} ({purpose}) is in use on {host}: stop what listens there, "
                f"or choose another with {variable}=…"
            ) from error


def find_free_ports(count: int) -> list[int]:
    """Return ports of this machine that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

"""Session-scoped fixtures: an export, a tritonserver that serves it, and `make demo`."""

import fcntl
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvcast.export.cache import CACHE_VARIABLE, TraceCache
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.export.release import fingerprint_release
from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.networks.weights import load_weights
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.tensors import USER_ENCODER
from kvcast.server import ServeConfig, TritonServer
from kvcast.server.log import open_log
from tests.support import EXPORTED_TOML, find_free_ports

ROOT = Path(__file__).parents[1]
# Tensors here are small: several threads wait for each other most of the time, on a busy machine above all. One thread
# also makes training repeatable bit for bit.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of `pytest -n` share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def traces(shared_folder: Path) -> Iterator[TraceCache]:
    """Traced graphs of this run alone, in processes that it starts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(shared_folder / "traces"))
        yield TraceCache(shared_folder / "traces")


@pytest.fixture(scope="session")
def tiny_repository(shared_folder: Path, traces: TraceCache) -> Path:
    """A model repository with the export of `tests/tiny.toml`; the workers of `pytest -n` share it."""
    folder = shared_folder
    repository = folder / "tiny" / "repository"
    with (folder / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not repository.exists():
            export_release(load_config(str(EXPORTED_TOML)), WeightsSource(seed=0), repository, lambda _: None, traces)
    return repository


@pytest.fixture
def own_repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository, for a test that damages it."""
    return Path(shutil.copytree(tiny_repository, tmp_path / "own"))


@pytest.fixture(scope="session")
def server(tiny_repository: Path) -> Iterator[TritonServer]:
    """A real tritonserver with all models of that export."""
    with open_log(stream=(stream := io.StringIO())), TritonServer(make_settings(tiny_repository)) as running:
        running.log = stream  # type: ignore[attr-defined]
        yield running


@dataclass(frozen=True)
class Demo:
    """What `make demo` printed in this checkout, the repository that it exported into, and the network in torch."""

    printed: str
    repository: Path
    network: RankingNetwork


@pytest.fixture(scope="session")
def demo() -> Demo:
    """Run `make demo` once; an export of other weights in the checkout is made again before."""
    config = load_config("demo")
    assert config.weights is not None
    network = build_network(config)
    load_weights(network, config.weights)
    repository = ROOT / "model_repository"
    try:
        exported = read_manifest(repository / USER_ENCODER.name / "1")
        is_stale = exported.config == config.name and exported.release != fingerprint_release(network)
    except ArtefactError:
        is_stale = False
    if is_stale:
        run_make("export")
    return Demo(run_make("demo"), repository, network)


def make_environment() -> dict[str, str]:
    """Return the environment of a person's shell in which `make` and `kvcast` take free ports."""
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), map(str, find_free_ports(3)), strict=True))
    environment = {**os.environ, **ports, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("MAKEFLAGS", "CONFIG", "REPOSITORY"):
        environment.pop(name, None)
    return environment


def run_make(target: str) -> str:
    """Run a target in the checkout; return what it printed."""
    done = subprocess.run(
        ["make", target], cwd=ROOT, env=make_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"make {target}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_settings(repository: Path) -> ServeConfig:
    """Return settings on free ports, with the reference model too."""
    http, grpc, metrics = find_free_ports(3)
    return ServeConfig(
        repository, ["ranker", "ranker_resident", "ranker_full"], http_port=http, grpc_port=grpc, metrics_port=metrics
    )

"""Fixtures that cost seconds, made once a session: an exported `tiny` repository and a tritonserver on it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcast.contract.config import load_config
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.server import ServerSettings, TritonServer
from tests.support import find_free_ports


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the `tiny` export."""
    repository = tmp_path_factory.mktemp("tiny") / "repository"
    export_release(load_config("tiny"), WeightsSource(seed=0), repository, say=lambda _: None)
    return repository


@pytest.fixture
def own_repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository, for a test that damages it."""
    return Path(shutil.copytree(tiny_repository, tmp_path / "own"))


@pytest.fixture(scope="session")
def server(tiny_repository: Path) -> Iterator[TritonServer]:
    """A real tritonserver with all models of the `tiny` export."""
    log: list[str] = []
    with TritonServer(make_settings(tiny_repository), log=log.append) as running:
        yield running


def make_settings(repository: Path) -> ServerSettings:
    """Return settings on free ports, with the reference model too."""
    http, grpc, metrics = find_free_ports(3)
    return ServerSettings(
        repository, ["ranker", "ranker_resident", "ranker_full"], http_port=http, grpc_port=grpc, metrics_port=metrics
    )

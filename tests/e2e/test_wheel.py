"""The wheel, installed in an empty folder beside this environment's packages: it exports all by itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvcast.protocol.config import list_configs
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.tensors import EXPORTED_MODELS, MODELS

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "src", "export", "model_repository")
EXPORTED = ("model.onnx", "weights.data", "manifest.json", "golden.json")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a checkout that contains an export."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    for name in SOURCES:
        source, target = ROOT / name, checkout / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "releases.json", *EXPORTED))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for model in EXPORTED_MODELS:
        for name in EXPORTED:
            (checkout / "model_repository" / model.name / "1" / name).touch()
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(checkout)]
    run_pip(*command)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `kvcast` is what the wheel installs."""
    site = tmp_path_factory.mktemp("installed") / "site"
    run_pip("install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    return {**os.environ, "PYTHONPATH": str(site)}


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(environment: dict[str, str], folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_package_and_what_an_export_starts_from_and_nothing_that_was_exported(wheel: Path):
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"kvcast"}
    code = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    patterns = ("export/configs/*", "model_repository/*/config.pbtxt", "model_repository/*/1/model.py")
    data = {"kvcast/_data" / path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    assert len(data) > 10
    assert code | data | {Path("kvcast/py.typed")} <= names
    assert not {name.name for name in names} & {*EXPORTED, "demo.safetensors"}


def test_every_configuration_is_there_and_the_demo_is_exported_with_random_weights(
    environment: dict[str, str], tmp_path: Path
):
    assert "kvcast export" in run_python(environment, tmp_path, "-m", "kvcast", "export", "--help")
    code = (
        "import kvcast; from kvcast.protocol.config import list_configs, load_config; print(kvcast.__file__); "
        "print(*(load_config(name).name for name in list_configs()))"
    )
    file, names = run_python(environment, tmp_path, "-c", code).splitlines()
    assert Path(file).is_relative_to(environment["PYTHONPATH"])
    assert names.split() == list_configs()
    printed = run_python(environment, tmp_path, "-m", "kvcast", "export", "--repository", "repository")
    assert "the trained weights of demo come with the checkout" in printed
    assert "weights: random, of seed 0" in printed
    assert {path.name for path in (tmp_path / "repository").iterdir()} == {model.name for model in MODELS}
    for model in MODELS:
        assert (tmp_path / "repository" / model.name / "config.pbtxt").is_file()
    for model in EXPORTED_MODELS:
        assert read_manifest(tmp_path / "repository" / model.name / "1").config == "demo"
        assert (tmp_path / "repository" / model.name / "1" / "model.py").is_file()

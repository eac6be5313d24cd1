"""The container, as far as it can be held without a container engine: linted, its install step run, served with.

Nothing here pulls NVIDIA's image. Its place is taken by an empty virtual environment of the image's Python (3.12, if
the machine has one) and a tritonserver on PATH, which is the wheel's with that Python's stub.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcast.server.installation import STUB
from tests.processes import read_until, wait_until
from tests.support import find_free_ports

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORE_FILE = ROOT / "deploy" / "Dockerfile.dockerignore"
VENV = "/opt/kvcast"
IMAGE_PYTHON = "python3.12"


@dataclass(frozen=True)
class Instruction:
    """One instruction of the Dockerfile, and the stage that it belongs to."""

    stage: int
    keyword: str
    text: str


def read_dockerfile() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    stage, found = 0, []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        keyword, _, rest = line.partition(" ")
        stage += keyword == "FROM"
        if keyword:
            found.append(Instruction(stage, keyword, rest))
    return found


def find_all(keyword: str, stage: int | None = None) -> list[str]:
    return [each.text for each in read_dockerfile() if each.keyword == keyword and stage in (None, each.stage)]


def find_only(keyword: str, words: str = "") -> str:
    (found,) = [text for text in find_all(keyword) if words in text]
    return found


def list_copied() -> list[str]:
    """Return the paths that are copied from the checkout."""
    texts = [text for text in find_all("COPY") if not text.startswith("--from")]
    return [source for text in texts for source in text.split()[:-1]]


# -- what is written there


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_that_is_ignored_has_its_reason_above():
    lines = DOCKERFILE.read_text().splitlines()
    for number, line in enumerate(lines):
        for rule in re.findall(r"hadolint ignore=(.+)", line):
            reasons = [each for each in lines[:number] if each.startswith(f"# {rule}: ")]
            assert reasons, f"{rule} is ignored without a reason"


def test_every_path_that_is_copied_exists_and_is_let_through():
    allowed = [line[1:] for line in IGNORE_FILE.read_text().splitlines() if line.startswith("!")]
    assert "*" in IGNORE_FILE.read_text().splitlines()
    assert list_copied() == allowed
    for path in list_copied():
        assert (ROOT / path).exists(), path


def test_both_stages_have_one_pinned_image():
    assert set(find_all("FROM")) == {
        "nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3 AS build",
        "nvcr.io/nvidia/tritonserver:${TRITON_VERSION}-py3",
    }
    assert re.fullmatch(r"TRITON_VERSION=\d\d\.\d\d", find_only("ARG", "TRITON_VERSION"))


def test_it_does_not_run_as_root_and_exposes_the_served_ports():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", find_only("USER"))  # by number, as runAsNonRoot wants it
    assert find_only("EXPOSE").split() == ["8000", "8001", "8002"]
    assert json.loads(find_only("ENTRYPOINT"))[-1] == "kvcast"


# -- its install step, run


@dataclass(frozen=True)
class Image:
    """What stands for the image: the virtual environment, and the interpreter that made it."""

    venv: Path
    python: Path

    @property
    def environment(self) -> dict[str, str]:
        """The final stage's environment."""
        variables = dict(part.split("=", 1) for text in find_all("ENV", stage=2) for part in text.split())
        path = variables.pop("PATH").replace(VENV, str(self.venv)).replace("${PATH}", "/usr/bin:/bin")
        return {"PATH": path, **variables}

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run something in the environment, outside the checkout."""
        words = list(map(str, command))
        return subprocess.run(words, env=self.environment, cwd=self.venv, capture_output=True, text=True, check=False)


def find_python() -> Path:
    """Return the image's Python where its programs can be built and embedded, else the one that runs."""
    candidates = [shutil.which(IMAGE_PYTHON), *Path.home().glob(f".pyenv/versions/3.12*/bin/{IMAGE_PYTHON}")]
    for python in filter(None, candidates):
        library = find_library(Path(python))
        if shutil.which("gcc") and library is not None and (library / f"lib{IMAGE_PYTHON}.so.1.0").exists():
            return Path(python)
    return Path(sys.executable)


def find_library(python: Path) -> Path | None:
    """Return where an interpreter's shared library lies; None if it does not run, as a version manager's shim."""
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The environment that the Dockerfile's commands make from what it copies."""
    folder = tmp_path_factory.mktemp("image")
    context, venv, python = folder / "context", folder / "venv", find_python()
    context.mkdir()
    for name in list_copied():
        source = ROOT / name
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, context / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, context / name)
    programs = folder / "programs"
    programs.mkdir()
    (programs / "python3").symlink_to(python)
    environment = {**os.environ, "PATH": f"{venv}/bin:{programs}:{os.environ['PATH']}", "DEVICE": "cpu"}
    for words in ("-m venv", "pip install"):
        command = find_only("RUN", words).replace(VENV, str(venv))
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=context, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return Image(venv, python)


def test_the_install_step_brings_the_commands(image):
    for command in ("serve", "probe", "release"):
        done = image.run("kvcast", command, "--help")
        assert done.returncode == 0, done.stderr
        assert f"kvcast {command}" in done.stdout


def test_it_contains_the_packages_that_serve(image):
    rooms = [path for path in list_copied() if (ROOT / path / "__init__.py").exists()]
    assert {Path(path).name for path in rooms} >= {"protocol", "serving", "gateway", "server", "client"}
    code = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]), sep='\\n')"
    done = image.run("python", "-c", code, *(f"kvcast.{Path(room).name}" for room in rooms), "kvcast.gateway.__main__")
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(image.venv), file


@pytest.mark.parametrize("module", ["torch", "onnx", "pytriton", "matplotlib", "kvcast.export", "perf"])
def test_it_contains_nothing_that_serving_does_not_need(image, module):
    done = image.run("python", "-c", f"import {module}")
    assert "ModuleNotFoundError" in done.stderr


def test_its_packages_are_the_pinned_ones_and_agree(image):
    listed = image.run("pip", "freeze", "--exclude", "kvcast").stdout.split()
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").split()
    assert [each for each in listed if each.lower().replace("_", "-") not in pinned] == []
    assert [each for each in listed if each.startswith("numpy==1.")]
    assert image.run("pip", "check").returncode == 0


def test_a_device_that_does_not_exist_is_refused():
    command = find_only("RUN", "pip install")
    done = subprocess.run(
        ["/bin/sh", "-c", command], env={**os.environ, "DEVICE": "tpu"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (1, "DEVICE: cpu or gpu")


# -- served with


@pytest.fixture
def tritonserver(image: Image, tmp_path: Path) -> Path:
    """A folder with a tritonserver that needs nothing from its caller, as the image has one."""
    root = Path(sysconfig.get_path("purelib")) / "pytriton" / "tritonserver"
    version = image.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    backend = tmp_path / "backends" / "python"
    backend.mkdir(parents=True)
    for source in [*(root / "backends" / "python").iterdir(), root / "python_backend_stubs" / version / STUB]:
        (backend / source.name).symlink_to(source)
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.write_text(
        f"#!/bin/sh\nexport LD_LIBRARY_PATH='{find_library(image.python)}'\n"
        f'exec {root}/bin/tritonserver --backend-directory={backend.parent} "$@"\n'
    )
    binary.chmod(0o755)
    return binary.parent


@pytest.fixture
def served(image: Image, tritonserver: Path, tiny_repository: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The container's command on the `tiny` repository; the process, and its gRPC address."""
    command = [*json.loads(find_only("ENTRYPOINT"))[1:], *json.loads(find_only("CMD", '"serve"'))]
    places = {"/models": str(tiny_repository), "0.0.0.0": "127.0.0.1"}  # noqa: S104 replaced
    http, grpc, metrics = find_free_ports(3)
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    environment = image.environment
    environment["PATH"] += f":{tritonserver}"
    process = subprocess.Popen(
        [*(places.get(word, word) for word in command), *ports],
        env=environment, cwd=image.venv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        read_until(process, "Ctrl-C stops it")
        yield process, f"127.0.0.1:{grpc}"
    finally:
        process.terminate()
        process.communicate()


def test_its_command_serves_is_probed_writes_nothing_and_drains(image, served, tiny_repository):
    process, address = served
    before = list_files(tiny_repository)
    _, _, check = find_only("HEALTHCHECK").partition("CMD ")
    *shell, command = json.loads(check)
    done = image.run(*shell, command.replace("127.0.0.1:8001", address))
    assert done.returncode == 0, done.stdout + done.stderr
    models = [path for path in Path("/proc").glob("[0-9]*/maps") if is_model_of(path, image.venv)]
    assert models, "no model's process has the packages of the environment"
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None, 20)
    assert process.returncode == 0
    assert list_files(tiny_repository) == before


def list_files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def is_model_of(maps: Path, venv: Path) -> bool:
    """Whether a process is a Triton stub that has loaded libraries of an environment."""
    try:
        return STUB in maps.with_name("cmdline").read_text() and f"{venv}/" in maps.read_text()
    except OSError:
        return False

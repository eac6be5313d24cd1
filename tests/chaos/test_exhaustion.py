"""Full memory, full disks, damaged files: clear words, never a wrong score, and all well again when there is room.

A small file system is mounted in a namespace of its own, so the machine's stays as it is.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from kvcast.client import NO_RETRIES, RankerClient
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.protocol.config import ModelConfig, load_config
from kvcast.protocol.errors import KvcastError, TryAgainError
from kvcast.protocol.manifest import hash_file
from kvcast.server import ServeConfig, ServerError, TritonServer
from kvcast.server.releases import ReleaseStore
from kvcast.server.stubs import list_stubs
from tests.conftest import make_settings
from tests.processes import find_children, wait_until
from tests.support import TOLERANCE, draw_request, find_free_ports

CONFIG = load_config("tiny")
LONG_HISTORY, MOST_USERS = 4096, 8
RECOVERED_WITHIN_SECONDS = 40
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 where Triton keeps its regions


class Namespace:
    """A small file system over one folder, for those processes alone that are started in here."""

    def __init__(self, folder: Path, size: str) -> None:
        mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && echo mounted && exec sleep 3600"
        self._holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "mounted\n"
        pid = str(self._holder.pid)
        self._enter = ["nsenter", "--preserve-credentials", "-t", pid, "-U", "-m", "--"]
        self.folder = folder
        self.outside = Path(f"/proc/{pid}/root{folder}")
        """The same folder, as it is seen from outside."""

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )

    def run(self, *command: str) -> tuple[int, str]:
        with self.start(*command) as process:
            text = process.communicate(timeout=120)[0]
        return process.returncode, text

    def resize(self, size: str) -> None:
        assert self.run("mount", "-o", f"remount,size={size}", str(self.folder))[0] == 0

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


@pytest.fixture
def make_namespace() -> Iterator[Callable[[Path, str], Namespace]]:
    tried = (
        subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if tried is None or tried.returncode or shutil.which("nsenter") is None:
        pytest.skip("this machine does not allow a file system of one's own (unshare -rm)")
    with contextlib.ExitStack() as stack:

        def make(folder: Path, size: str) -> Namespace:
            namespace = Namespace(folder, size)
            stack.callback(namespace.close)
            return namespace

        yield make


@pytest.fixture(scope="module")
def long_config() -> ModelConfig:
    return dataclasses.replace(CONFIG, limits=msgspec.structs.replace(CONFIG.limits, history=LONG_HISTORY))


@pytest.fixture(scope="module")
def long_repository(long_config, tmp_path_factory) -> Path:
    """Histories so long that user KV does not fit into the memory that a model starts with."""
    repository = tmp_path_factory.mktemp("long") / "repository"
    export_release(long_config, WeightsSource(seed=0), repository, say=lambda _: None)
    return repository


def serve_command(repository: Path) -> tuple[list[str], list[int]]:
    ports = find_free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    return [sys.executable, "-m", "kvcast.server", "--repository", str(repository), *flags], ports


@contextlib.contextmanager
def serve_in(namespace: Namespace, repository: Path) -> Iterator[tuple[int, list[int]]]:
    """Serve; give the process id of tritonserver, and the ports."""
    command, ports = serve_command(repository)
    with namespace.start(*command) as process:
        lines: list[str] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C" in line:
                    break
            else:
                raise AssertionError("".join(lines[-20:]))
            yield next(pid for pid in find_children(process.pid) if list_stubs(pid)), ports
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=40)


def fill(folder: Path) -> Path:
    """Leave no room."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return path


def read_state_at(port: int) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/kvcast/state", timeout=5) as reply:
        return json.load(reply)


def ask_users(port: int, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rank for several users in one request, which the client's own interface does not."""
    inputs = []
    for name, ids in (("history", history), ("candidates", candidates)):
        inputs.append(tritonclient.grpc.InferInput(name, list(ids.shape), "INT64"))
        inputs[-1].set_data_from_numpy(ids)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        scores = client.infer("ranker", inputs, client_timeout=15).as_numpy("scores")
    assert scores is not None
    return np.array(scores)


def test_too_little_shared_memory_at_start_is_a_clear_error(make_namespace, tiny_repository):
    namespace = make_namespace(SHARED_MEMORY, "20m")
    status, text = namespace.run(*serve_command(tiny_repository)[0])
    assert status == 1
    assert len(text.splitlines()) == 1
    for word in ("kvcast serve: /dev/shm: expected 34 MB free", "got 21 MB", "docker run --shm-size"):
        assert word in text


def test_full_shared_memory_while_serving_kills_no_process_and_spoils_no_score(
    make_namespace, long_repository, long_config
):
    namespace = make_namespace(SHARED_MEMORY, "300m")
    requests = [draw_request(CONFIG, 30, 7, seed) for seed in range(20)]
    users = [draw_request(long_config, LONG_HISTORY, 7, seed) for seed in range(MOST_USERS)]
    history, candidates = (np.stack(each) for each in zip(*users, strict=True))
    with (
        serve_in(namespace, long_repository) as (triton, (http_port, grpc_port, _)),
        RankerClient(f"127.0.0.1:{grpc_port}", retry=NO_RETRIES, deadline=10) as client,
    ):
        expected = [client.rank(*each).scores for each in requests]
        stubs = set(list_stubs(triton))
        filler = fill(namespace.outside)
        said = []
        for _ in range(3):
            with pytest.raises(InferenceServerException) as caught:
                ask_users(grpc_port, history, candidates)
            said.append(caught.value)
            for each, right in zip(requests, expected, strict=True):
                with contextlib.suppress(TryAgainError):
                    np.testing.assert_allclose(client.rank(*each).scores, right, rtol=0, atol=TOLERANCE)
        assert {each.status() for each in said} == {"StatusCode.RESOURCE_EXHAUSTED"}, [each.message() for each in said]
        assert all("shared memory is full" in str(each.message()) for each in said), said
        assert set(list_stubs(triton)) == stubs
        assert read_state_at(http_port)["deaths"] == {}
        filler.unlink()
        scores = ask_users(grpc_port, history, candidates)
        for index, (own_history, own_candidates) in enumerate(users):
            alone = client.rank(own_history, own_candidates).scores
            np.testing.assert_allclose(scores[index], alone, rtol=0, atol=TOLERANCE)
        for each, right in zip(requests, expected, strict=True):
            np.testing.assert_allclose(client.rank(*each).scores, right, rtol=0, atol=TOLERANCE)
        assert set(list_stubs(triton)) == stubs


def hash_all(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_at_export_leaves_the_old_export_serving(make_namespace, tiny_repository, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    namespace = make_namespace(folder, "64m")
    assert namespace.run("cp", "-r", str(tiny_repository), str(folder / "repository"))[0] == 0
    before = hash_all(namespace.outside)
    fill(namespace.outside)
    with (namespace.outside / "filler").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - (256 << 10))  # room for a part
    command = ["-m", "kvcast.export", "--config", "tiny", "--seed", "1", "--repository", str(folder / "repository")]
    status, text = namespace.run(sys.executable, *command)
    assert status == 1
    (sentence,) = (line for line in text.splitlines() if line.startswith("kvcast export:"))
    assert os.strerror(errno.ENOSPC) in sentence
    assert "Traceback" not in text
    after = hash_all(namespace.outside)
    assert after.pop("filler")
    assert after == before
    (namespace.outside / "filler").unlink()
    with serve_in(namespace, folder / "repository") as (_, (_, port, _)), RankerClient(f"127.0.0.1:{port}") as client:
        assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1


def copy_as_another_release(repository: Path, target: Path) -> Path:
    """Return a copy whose manifests name another release: what a store looks at."""
    shutil.copytree(repository, target)
    for path in target.glob("*/1/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "release": "1" * 64}))
    return target


def test_a_full_disk_at_publication_publishes_nothing_and_a_retry_succeeds(make_namespace, tiny_repository, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    repository = folder / "repository"
    files = [path.stat() for path in tiny_repository.rglob("*") if path.is_file()]
    size = sum({each.st_ino: each.st_size for each in files}.values())  # the models share their weights
    namespace = make_namespace(folder, str(size * 7 // 4))
    assert namespace.run("cp", "-a", str(tiny_repository), str(repository))[0] == 0
    source = copy_as_another_release(tiny_repository, tmp_path / "source")
    publish = [sys.executable, "-c", PUBLISH, str(repository), str(source)]
    before = hash_all(namespace.outside)
    status, text = namespace.run(*publish)
    assert status == 1
    for words in ("cannot be published", os.strerror(errno.ENOSPC), "nothing was changed"):
        assert words in text, text
    assert hash_all(namespace.outside) == before
    assert {path.name for path in namespace.outside.glob("repository/*/[0-9]*")} == {"1"}
    assert not list(namespace.outside.glob("repository/.publishing-*"))
    namespace.resize(str(4 * size))
    status, text = namespace.run(*publish)
    assert status == 0, text
    record = ReleaseStore(namespace.outside / "repository").read()
    assert ([each.release_number for each in record.releases], record.active) == ([1, 2], 1)


PUBLISH = """
import sys
from pathlib import Path
from kvcast.server import ServerError
from kvcast.server.releases import ReleaseStore
try:
    ReleaseStore(Path(sys.argv[1])).publish(Path(sys.argv[2]))
except ServerError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("step", ["_write", "_add_missing_configs"])
def test_a_publication_that_fails_at_its_last_step_leaves_nothing(tiny_repository, tmp_path, monkeypatch, step):
    store = ReleaseStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(store, step, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(ServerError, match="No space left on device"):
            store.publish(tiny_repository)
    assert not list((tmp_path / "store").glob("*/[0-9]*/manifest.json"))
    assert store.read().releases == ()
    assert store.publish(tiny_repository).release_number == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_scores(path: Path) -> None:
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "scores": [score + 0.01 for score in table["scores"]]}))
    manifest = path.with_name("manifest.json")  # with checksums that match
    table = json.loads(manifest.read_text())
    table["files"][path.name] = hash_file(path)
    manifest.write_text(json.dumps(table))


def take_from(model: str) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        path.write_bytes((path.parents[2] / model / "1" / path.name).read_bytes())

    return swap


def take_other_release(path: Path) -> None:
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "release": "0" * 64}))


DAMAGES = {
    "truncated graph": ("doc_fusion/1/model.onnx", truncate, "SHA-256"),
    "swapped graph": ("user_encoder/1/model.onnx", take_from("doc_fusion"), "SHA-256"),
    "manifest of another model": ("doc_fusion/1/manifest.json", take_from("user_encoder"), "expected the artefact of"),
    "manifest of another release": ("doc_fusion/1/manifest.json", take_other_release, "different releases"),
    "half a manifest": ("doc_fusion/1/manifest.json", truncate, "manifest: expected JSON"),
    "half a golden request": ("user_encoder/1/golden.json", truncate, "SHA-256"),
    "other scores": ("user_encoder/1/golden.json", change_scores, "does not compute what was proved"),
    "half a golden request, resident": ("ranker_resident/1/golden.json", truncate, "SHA-256"),
    "other scores, resident": ("ranker_resident/1/golden.json", change_scores, "does not compute what was proved"),
    "no golden request": ("ranker_resident/1/golden.json", Path.unlink, "golden.json: cannot be read"),
}


def settings_of(repository: Path, name: str) -> ServeConfig:
    model = "ranker_resident" if name.startswith("ranker_resident") else "ranker"
    return dataclasses.replace(make_settings(repository), models=[model])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rejected_at_start_with_a_clear_error(own_repository, damage):
    name, hurt, words = DAMAGES[damage]
    path = own_repository / name
    whole, manifest = path.read_bytes(), path.with_name("manifest.json").read_bytes()
    hurt(path)
    with pytest.raises(KvcastError) as caught, TritonServer(settings_of(own_repository, name)):
        pytest.fail("it started")
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)
    path.with_name("manifest.json").write_bytes(manifest)
    path.write_bytes(whole)
    if damage in ("truncated graph", "other scores"):  # the others end in the same way
        with TritonServer(settings_of(own_repository, name)) as server, RankerClient(server.grpc_address) as client:
            assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1


@pytest.mark.parametrize(
    "damage",
    ["swapped graph", "manifest of another model", "half a golden request, resident", "other scores"],
)
def test_a_file_damaged_while_serving_is_not_loaded_and_the_server_recovers_with_it(own_repository, damage, caplog):
    caplog.set_level(logging.INFO, "kvcast")  # what a failure needs to be understood
    name, hurt, words = DAMAGES[damage]
    path = own_repository / name
    settings = settings_of(own_repository, name)
    with (
        TritonServer(settings) as server,
        RankerClient(server.grpc_address, model=settings.models[0], retry=NO_RETRIES, deadline=2) as client,
    ):
        request = draw_request(CONFIG, 30, 7, 0)
        right = client.rank(*request).scores
        whole, manifest = path.read_bytes(), path.with_name("manifest.json").read_bytes()
        hurt(path)
        np.testing.assert_allclose(client.rank(*request).scores, right, rtol=0, atol=TOLERANCE)
        stub = next(each for each in list_stubs(server.pid).values() if each.model == name.partition("/")[0])
        os.kill(stub.pid, signal.SIGKILL)
        port = server.settings.http_port
        wait_until(lambda: words in read_state_at(port)["reason"], RECOVERED_WITHIN_SECONDS)
        assert not read_state_at(port)["is_ready"]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://{server.http_address}/v2/health/ready", timeout=5)
        with pytest.raises(KvcastError):
            client.rank(*request)
        path.with_name("manifest.json").write_bytes(manifest)
        path.write_bytes(whole)
        wait_until(lambda: read_state_at(port)["is_ready"], RECOVERED_WITHIN_SECONDS)
        np.testing.assert_allclose(client.rank(*request).scores, right, rtol=0, atol=TOLERANCE)

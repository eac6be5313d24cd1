"""Releases: published whole or not at all, tried before traffic moves, switched under load without one wrong score."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import stat
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.manifest import hash_file
from kvcast.protocol.tensors import EXPORTED_MODELS
from kvcast.server import ServeConfig, ServerError, TritonServer
from kvcast.server.release import main as release
from kvcast.server.releases import ReleaseStore
from kvcast.server.stubs import list_stubs
from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.conftest import make_settings
from tests.processes import read_state, wait_until
from tests.support import EXPORTED_TOML, Ids, make_network

SWITCHES = 20
PUSHES = 20 if "KVCAST_THOROUGH" in os.environ else 2


@pytest.fixture(scope="module")
def other_export(tmp_path_factory, tiny_repository, traces):
    """An export with other weights: other scores."""
    folder = tmp_path_factory.mktemp("other") / "export"
    export_release(load_config(str(EXPORTED_TOML)), WeightsSource(seed=1), folder, lambda _: None, traces)
    return folder


@pytest.fixture
def repository(tiny_repository, other_export, tmp_path):
    """A repository with two releases, of which the first is active."""
    store = ReleaseStore(tmp_path / "repository")
    for export in (tiny_repository, other_export):
        store.publish(export)
    store.activate(1)
    return store.repository


def serve(repository: Path, **changes) -> TritonServer:
    models = ["ranker", "ranker_resident"]
    return TritonServer(dataclasses.replace(make_settings(repository), **{"models": models, **changes}))


def run(server: TritonServer, *arguments: str) -> int:
    return release([*arguments, "--repository", str(server.settings.repository), "--server", server.http_address])


def test_twenty_switches_under_load_fail_no_request_and_mix_no_releases(repository, capsys):
    requests = draw_requests()
    with serve(repository) as server:
        answers = {}
        for number in (2, 1):
            assert run(server, "activate", str(number)) == 0
            for model in ("ranker", "ranker_resident"):
                answers[number, model] = record_answers(server.grpc_address, requests, model)
        with contextlib.ExitStack() as stack:
            loads = [
                stack.enter_context(
                    Load(address, expect(requests, answers[1, model], answers[2, model]), model, protocol, threads=2)
                )
                for model in ("ranker", "ranker_resident")
                for protocol, address in (("grpc", server.grpc_address), ("http", server.http_address))
            ]
            for switch in range(SWITCHES):
                switch_to(server, 1 if switch % 2 else 2, answers, requests)
        for load in loads:
            assert set(load.count()) == {"right"}, (load.model, load.protocol, load.count())
            assert load.count()["right"] > SWITCHES
    capsys.readouterr()


def switch_to(server, number, answers, requests):
    """Switch, and check that requests from now on get that release's scores."""
    assert run(server, *(("rollback",) if number == 1 else ("activate", "2"))) == 0
    assert read_state(server)["release_number"] == number
    for model in ("ranker", "ranker_resident"):
        for scores, right in zip(
            record_answers(server.grpc_address, requests[:3], model), answers[number, model], strict=False
        ):
            np.testing.assert_allclose(scores, right, rtol=0, atol=1e-5)


def test_pushes_under_load_fail_no_request_and_score_as_their_weights_do(tiny_repository, tmp_path, capfd):
    """From weights in a file to scores that are theirs, again and again; and what is old is deleted."""
    store, requests = ReleaseStore(tmp_path / "repository"), draw_requests(6)
    store.publish(tiny_repository)
    store.activate(1)
    networks = [make_network(load_config(str(EXPORTED_TOML)), seed) for seed in range(PUSHES + 1)]
    answers = [[score_in_torch(network, *request) for request in requests] for network in networks]
    options = ("--config", str(EXPORTED_TOML), "--keep", "2")
    with serve(store.repository, models=["ranker"]) as server:
        with Load(server.grpc_address, expect(requests, *answers), threads=2) as load:
            for seed, network in enumerate(networks[1:], start=1):
                save_file(network.state_dict(), tmp_path / "new.safetensors")
                assert run(server, "push", str(tmp_path / "new.safetensors"), *options) == 0
                for scores, right in zip(record_answers(server.grpc_address, requests), answers[seed], strict=True):
                    np.testing.assert_allclose(scores, right, rtol=0, atol=1e-5)
            load.wait_for(20)
        assert set(load.count()) == {"right"}, [each for each in load.outcomes if each.what != "right"][:3]
        said = capfd.readouterr().out
        assert "is traced" not in said.partition("serves release 2")[2], "only the first traces, if that"
        assert [each.release_number for each in store.read().releases] == [PUSHES, PUSHES + 1]
        assert sorted(path.name for path in (store.repository / "doc_fusion").glob("[0-9]*")) == sorted(
            str(number) for number in range(PUSHES, PUSHES + 2)
        )
        assert "release 1 (" in said
        # The same weights once more are the same release; one that cannot be exported changes nothing.
        assert run(server, "push", str(tmp_path / "new.safetensors"), *options) == 0
        assert f"release {PUSHES + 1} has these weights" in capfd.readouterr().out
        (tmp_path / "new.safetensors").write_bytes(b"no weights")
        assert run(server, "push", str(tmp_path / "new.safetensors"), *options) == 1
        assert "could not be exported; what is served stays as it is" in capfd.readouterr().err
        assert read_state(server)["release_number"] == PUSHES + 1
    weights = [store.find_folder(model.name, PUSHES) / "weights.data" for model in EXPORTED_MODELS]
    assert len({path.stat().st_ino for path in weights}) == 1, "one file of weights"


@torch.inference_mode()
def score_in_torch(network: RankingNetwork, history: Ids, candidates: Ids) -> npt.NDArray[np.float32]:
    user_kv = network.encode_user(torch.from_numpy(history if len(history) else 0 * candidates[:1, :2])[None])
    return network.fuse(user_kv, torch.from_numpy(candidates)[None])[0].numpy()


def test_a_command_that_switches_waits_for_another(repository, capsys):
    store = ReleaseStore(repository)
    with store.switching(lambda: pytest.fail("nobody is before it")):
        other = threading.Thread(target=release, args=(["activate", "2", "--repository", str(repository)],))
        other.start()
        wait_until(lambda: "another command is switching releases: waiting for it" in capsys.readouterr().out, 20)
        assert store.read().active == 1
    other.join()
    assert store.read().active == 2


def test_a_push_names_the_configuration_that_it_lacks(tmp_path, capsys):
    assert release(["push", "new.safetensors", "--repository", str(tmp_path / "repository")]) == 1
    assert "config: expected one of bench, demo, " in capsys.readouterr().err


@pytest.mark.parametrize("victim", ["user_encoder", "doc_fusion"])
def test_processes_that_die_during_switches_fail_no_request(repository, victim, capsys):
    """The switch may then be refused; whatever is served is served whole."""
    requests = draw_requests(8)
    with serve(repository, models=["ranker"]) as server:
        answers = {}
        for number in (2, 1):
            assert run(server, "activate", str(number)) == 0
            answers[number] = record_answers(server.grpc_address, requests)
        with Load(server.grpc_address, expect(requests, answers[1], answers[2]), threads=4) as load:
            for switch in range(4):
                load.wait_for(20)
                switching = threading.Thread(target=run, args=(server, "activate", str(2 - switch % 2)))
                switching.start()
                time.sleep(0.2 * switch)
                stub = next(each for each in list_stubs(server.pid).values() if each.model == victim)
                os.kill(stub.pid, signal.SIGKILL)
                switching.join()
                wait_until(lambda: read_state(server)["is_ready"], 20)
            load.wait_for(20)
        assert set(load.count()) == {"right"}, [each for each in load.outcomes if each.what != "right"][:3]
        for scores, right in zip(
            record_answers(server.grpc_address, requests), answers[read_state(server)["release_number"]], strict=True
        ):
            np.testing.assert_allclose(scores, right, rtol=0, atol=1e-5)
    capsys.readouterr()


def test_a_release_that_computes_something_else_is_refused_and_the_old_one_stays(repository, capsys):
    """Golden scores that are not this release's: what other hardware or another library would look like."""
    store = ReleaseStore(repository)
    for model in EXPORTED_MODELS:
        damage(store, model.name, 2)
    requests = draw_requests(4)
    with serve(repository, models=["ranker"]) as server:
        before = record_answers(server.grpc_address, requests)
        assert run(server, "activate", "2") == 1
        assert "golden request" in capsys.readouterr().err
        assert store.read().active == 1
        assert read_state(server)["release_number"] == 1
        assert read_state(server)["is_ready"]
        for scores, right in zip(record_answers(server.grpc_address, requests), before, strict=True):
            np.testing.assert_array_equal(scores, right)
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as reply:
            assert b"kvcast_active_release 1.0" in reply.read()


def damage(store: ReleaseStore, model: str, number: int) -> None:
    """Write other golden scores, with the checksums of a release that was published so."""
    folder = store.find_folder(model, number)
    folder.chmod(0o755)
    golden, manifest = (folder / name for name in ("golden.json", "manifest.json"))
    for path in (golden, manifest):
        path.chmod(0o644)
    table = json.loads(golden.read_text())
    table["scores"][0] += 0.001
    golden.write_text(json.dumps(table))
    described = json.loads(manifest.read_text())
    described["files"]["golden.json"] = hash_file(golden)
    manifest.write_text(json.dumps(described))
    record_path = store.repository / "releases.json"
    record = json.loads(record_path.read_text())
    entry = next(each for each in record["releases"] if each["release_number"] == number)
    for path in (golden, manifest):
        entry["files"][f"{model}/{path.name}"] = hash_file(path)
    record_path.write_text(json.dumps(record))


def test_an_altered_file_is_refused_before_anything_is_loaded(repository, capsys):
    path = repository / "doc_fusion" / "2" / "model.onnx"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"x")
    assert release(["activate", "2", "--repository", str(repository)]) == 1
    error = capsys.readouterr().err
    assert "doc_fusion/2/model.onnx" in error
    assert "SHA-256" in error
    assert ReleaseStore(repository).read().active == 1


def test_a_reader_never_sees_half_a_release(tiny_repository, other_export, tmp_path):
    store = ReleaseStore(tmp_path / "repository")
    store.publish(tiny_repository)
    problems: list[str] = []
    seen: list[int] = []
    stopping = threading.Event()

    def read() -> None:
        while not stopping.is_set():
            seen.append(len(store.read().releases))
            for each in store.read().releases:
                try:
                    store.check(each)
                except ServerError as error:
                    problems.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        store.publish(other_export)
        wait_until(lambda: 2 in seen[:-1], 30)  # it has been read and checked once more
    finally:
        stopping.set()
        reader.join()
    assert not problems
    assert [each.release_number for each in store.read().releases] == [1, 2]
    assert not [path for path in store.repository.iterdir() if path.name.startswith(".")]


def test_a_publication_that_fails_leaves_nothing(tiny_repository, other_export, tmp_path):
    store = ReleaseStore(tmp_path / "repository")
    store.publish(tiny_repository)
    broken = Path(shutil.copytree(other_export, tmp_path / "broken"))
    graph = broken / "ranker_full" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    before = sorted(store.repository.rglob("*"))
    with pytest.raises(ServerError, match=r"ranker_full/1/model.onnx: not the file that its manifest describes"):
        store.publish(broken)
    assert sorted(store.repository.rglob("*")) == before


def test_releases_cannot_be_changed_and_are_published_once(repository, tiny_repository, capsys):
    for path in repository.glob("*/[12]/*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222, path
    assert release(["publish", str(tiny_repository), "--repository", str(repository)]) == 1
    assert "was published before, as 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="never overwritten"):
        export_release(load_config("tiny"), WeightsSource(seed=2), repository, say=lambda _: None)


def rewrite(export: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of each model of an export, as an export of other code or limits would have written it."""
    for manifest in export.glob("*/1/manifest.json"):
        path = manifest.with_name(name)
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))
        described = json.loads(manifest.read_text())
        described["files"]["golden.json"] = hash_file(manifest.with_name("golden.json"))
        manifest.write_text(json.dumps(described))


def test_a_known_id_with_other_golden_scores_is_refused_and_with_other_limits_is_a_release(
    repository, own_repository, capsys
):
    before = ReleaseStore(repository).read()
    rewrite(own_repository, "golden.json", lambda golden: golden["scores"].__setitem__(0, golden["scores"][0] + 1e-4))
    assert release(["publish", str(own_repository), "--repository", str(repository)]) == 1
    said = capsys.readouterr().err
    assert "was published before, as 1, and its golden scores were others" in said
    assert "`version` of its family has not: raise it" in said
    assert ReleaseStore(repository).read() == before
    rewrite(own_repository, "golden.json", lambda golden: golden["scores"].__setitem__(0, golden["scores"][0] - 1e-4))
    assert release(["publish", str(own_repository), "--repository", str(repository)]) == 1
    assert "was published before, as 1\n" in capsys.readouterr().err
    rewrite(own_repository, "manifest.json", lambda manifest: manifest["limits"].update(candidates=7))
    assert release(["publish", str(own_repository), "--repository", str(repository)]) == 0
    first, _, third = ReleaseStore(repository).read().releases
    assert (first.release_id, third.release_number) == (third.release_id, 3)


def test_an_export_that_was_served_becomes_the_first_release(own_repository, other_export, capsys):
    assert release(["publish", str(other_export), "--repository", str(own_repository)]) == 0
    record = ReleaseStore(own_repository).read()
    assert (record.active, [each.release_number for each in record.releases]) == (1, [1, 2])
    assert release(["list", "--repository", str(own_repository)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("active       1") for line in lines), lines


def test_invalid_release_commands_are_clear_errors(tmp_path, repository, capsys):
    for arguments, words in (
        (["publish", str(tmp_path / "nothing")], "has no exported"),
        (["activate", "7"], "expected one of those published: 1 ("),
        (["rollback"], "no release was active before"),
        (["activate", "2", "--server", "127.0.0.1:9"], "127.0.0.1:9: no answer"),
    ):
        assert release([*arguments, "--repository", str(repository)]) == 1
        assert words in capsys.readouterr().err
    assert ReleaseStore(repository).read().active == 1
    with pytest.raises(ServerError, match="no release is active"), serve(make_inactive(repository)):
        pytest.fail("it started")


def make_inactive(repository: Path) -> Path:
    path = repository / "releases.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"active": None}))
    return repository


def test_without_a_server_the_next_start_serves_what_was_activated(repository, capsys):
    assert release(["activate", "2", "--repository", str(repository)]) == 0
    settings = dataclasses.replace(make_settings(repository), models=["ranker"])
    assert isinstance(settings, ServeConfig)
    with TritonServer(settings) as server:
        assert read_state(server)["release_number"] == 2
    capsys.readouterr()

"""The launcher without a server: what it finds, what it misses, and how it reads a log."""

import contextlib
import dataclasses
import datetime
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from kvcast.protocol.config import CONFIGS
from kvcast.protocol.errors import ConfigError, KvcastError
from kvcast.protocol.locate import locate
from kvcast.protocol.manifest import read_manifest
from kvcast.server import ServeConfig, ServerError, TritonServer, shared_memory
from kvcast.server.__main__ import make_parser
from kvcast.server.installation import find_installation
from kvcast.server.log import log_triton, open_log
from kvcast.server.release import read_state
from kvcast.server.releases import ReleaseStore
from kvcast.server.repository import check_port, count_shared_memory, ensure_exported, expand_models, read_config_name
from kvcast.server.stubs import Stub, check_numpy, list_stubs
from kvcast.server.triton_process import explain, has_members
from kvcast.server.view import View, find_models
from tests.processes import wait_until


@pytest.fixture
def no_tritonserver_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_tritonserver_on_path")
def test_the_wheels_server_gets_a_backend_of_links_and_its_environment(tmp_path):
    found = find_installation(tmp_path)
    assert found.binary.name == "tritonserver"
    assert found.binary.exists()
    (flag,) = found.flags
    backend = Path(flag.partition("=")[2]) / "python"
    names = {path.name for path in backend.iterdir()}
    assert {"libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"} <= names
    assert all(path.is_symlink() for path in backend.iterdir()), "a copied stub cannot find its libraries"
    assert found.environment["PATH"].startswith(str(Path(sys.executable).parent))


@pytest.mark.usefixtures("no_tritonserver_on_path")
def test_no_tritonserver_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"neither on PATH nor installed .* run `make setup`"):
        find_installation(tmp_path)


@pytest.mark.usefixtures("no_tritonserver_on_path")
def test_no_stub_for_this_python_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", FakeVersion())
    with pytest.raises(ServerError, match=r"no stub for Python 3.99: use one of 3.10, 3.11"):
        find_installation(tmp_path)


class FakeVersion:
    """A Python that does not exist yet."""

    major, minor = 3, 99


@pytest.mark.usefixtures("no_tritonserver_on_path")
def test_no_libpython_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(ServerError, match=r"(libpython3\.\d+)\.so\.1\.0 is missing.*apt-get install \1\)"):
        find_installation(tmp_path)


def test_a_script_on_path_is_preferred_and_left_as_it_is(tmp_path, monkeypatch):
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_installation(tmp_path / "workspace")
    assert found.binary == binary
    assert not found.flags
    assert not found.environment


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    """A folder with a program at `bin/tritonserver`, which is on PATH; Triton's own default has nothing."""
    monkeypatch.setattr("kvcast.server.installation.DEFAULT_BACKENDS", tmp_path / "default")
    (tmp_path / "elsewhere" / "bin").mkdir(parents=True)
    shutil.copy(sys.executable, tmp_path / "elsewhere" / "bin" / "tritonserver")
    (tmp_path / "prefix" / "bin").mkdir(parents=True)
    (tmp_path / "prefix" / "bin" / "tritonserver").symlink_to(tmp_path / "elsewhere" / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(tmp_path / "prefix" / "bin"))
    return tmp_path / "prefix"


def make_backend(folder: Path) -> None:
    (folder / "python").mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_stub"):
        (folder / "python" / name).touch()


def test_the_backends_beside_a_server_on_path_are_found_before_those_elsewhere(prefix, tmp_path):
    """Beside it, then beside what it is a link to, then where Triton itself looks."""
    for folder in (tmp_path / "default", tmp_path / "elsewhere" / "backends", prefix / "backends"):
        make_backend(folder)
        found = find_installation(tmp_path / "workspace")
        assert (found.binary, found.flags) == (prefix / "bin" / "tritonserver", [f"--backend-directory={folder}"])
    assert not find_installation(tmp_path / "workspace", ["--backend-directory=/own"]).flags


@pytest.mark.parametrize("name", ["libtriton_python.so", "triton_python_backend_stub"])
def test_a_server_on_path_without_python_backend_is_one_sentence(prefix, tmp_path, name):
    make_backend(prefix / "backends")
    (prefix / "backends" / "python" / name).unlink()
    with pytest.raises(
        ServerError, match=r"tritonserver has no Python backend: .*/prefix/backends, .*/default: .*=DIR`$"
    ):
        find_installation(tmp_path / "workspace")
    assert not find_installation(tmp_path / "workspace", ["--backend-directory", "/own"]).flags


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            ["/x/tritonserver: error while loading shared libraries: libb.so.1: cannot open shared object file"],
            "libb.so.1: cannot open shared object file",
        ),
        (
            [
                'E1121 23:45:11.7 300 server.cc:241] "CudaDriverHelper has not been initialized."',
                "E1121 23:45:12.0 300 model_lifecycle.cc:642] \"failed to load 'fusion' version 1: Internal: no file\"",
                "error: creating server: Internal - failed to load all models",
            ],
            "no file",
        ),
        (["I1121 fine", "error: something else"], "something else"),
        (["only this"], "only this"),
        ([], "it wrote nothing"),
    ],
)
def test_the_sentence_of_a_log_that_says_why(log, sentence):
    assert explain(log) == sentence


def test_models_are_expanded_to_those_that_hold_artefacts():
    assert expand_models(["ranker"]) == ["user_encoder", "doc_fusion"]
    assert expand_models(["ranker", "ranker_full", "doc_fusion"]) == ["user_encoder", "doc_fusion", "ranker_full"]
    with pytest.raises(ServerError, match="got none"):
        expand_models([])


def test_a_port_that_may_not_be_bound_is_one_sentence():
    with pytest.raises(ServerError, match=r"cannot bind HTTP to 192\.0\.2\.1:1"):
        check_port("192.0.2.1", 1, "HTTP", "HTTP_PORT")


def test_shared_memory_holds_two_requests_of_the_workload(tiny_repository):
    manifest = read_manifest(tiny_repository / "user_encoder" / "1")
    kv = manifest.user_kv.bytes_of(manifest.workload.history)
    assert count_shared_memory(manifest, ["ranker"]) > 2 * kv
    assert count_shared_memory(manifest, ["ranker_resident", "user_encoder"]) > 2 * kv
    # Nobody passes KV on here, so it needs no room.
    assert count_shared_memory(manifest, ["ranker_resident"]) == count_shared_memory(manifest, ["ranker"]) - 2 * kv


def test_the_name_of_a_configuration(tmp_path):
    assert read_config_name(None) is None
    assert read_config_name("bench") == "bench"
    text = (locate(CONFIGS) / "tiny.toml").read_text()
    (tmp_path / "my.toml").write_text(text.replace('name = "tiny"', 'name = "own"'))
    assert read_config_name(str(tmp_path / "my.toml")) == "own"
    with pytest.raises(ConfigError, match=r"the path of a TOML file, got .*missing\.toml"):
        read_config_name(str(tmp_path / "missing.toml"))


def test_an_export_that_is_there_is_not_made_again(tiny_repository, capsys):
    before = (tiny_repository / "doc_fusion" / "1" / "model.onnx").stat().st_mtime_ns
    ensure_exported(tiny_repository, ["ranker", "ranker_full"], "tiny")
    assert (tiny_repository / "doc_fusion" / "1" / "model.onnx").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_an_export_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(ServerError, match="nonsense could not be exported"):
        ensure_exported(tmp_path, ["ranker"], "nonsense")


OLD_RECORD = """{
  "releases": [
    {
      "number": 3,
      "fingerprint": "abcd1234",
      "config": "tiny",
      "published": "2026-01-01T00:00:00+00:00",
      "files": {"ranker/number": "00"}
    }
  ],
  "active": 3,
  "previous": null
}
"""


def test_a_record_of_an_older_version_is_read(tmp_path):
    (tmp_path / "releases.json").write_text(OLD_RECORD)
    record = ReleaseStore(tmp_path).read()
    release = record.find("abcd")
    assert (release.release_number, release.release_id, record.active) == (3, "abcd1234", 3)
    assert release.files == {"ranker/number": "00"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"active": 3', '"active": "3"', "active: expected `int | null`, got '3'"),
        ('"previous"', '"last"', "expected the keys ['active', 'previous', 'releases'], got ['active', 'last', 'rel"),
        ('"number": 3', '"number": 3.5', "releases[0].release_number: expected `int`, got 3.5"),
        ("{", "", "expected JSON"),
    ],
)
def test_what_is_no_record_of_releases_is_named(tmp_path, old, new, words):
    (tmp_path / "releases.json").write_text(OLD_RECORD.replace(old, new, 1))
    with pytest.raises(ServerError, match=rf"releases\.json: .*{re.escape(words)}"):
        ReleaseStore(tmp_path).read()


def test_stubs_are_known_by_their_command_and_zombies_are_none(tmp_path):
    model = tmp_path / "ranker" / "3" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text("read line\n")  # for bash
    children = [
        subprocess.Popen([program, model], executable="/bin/bash", stdin=subprocess.PIPE, start_new_session=True)
        for program in (tmp_path / "triton_python_backend_stub", tmp_path / "another")
    ]
    stub, group = children[0], children[0].pid
    try:
        wait_until(lambda: set(list_stubs(os.getpid())) == {stub.pid}, 5)
        assert list_stubs(os.getpid())[stub.pid] == Stub(stub.pid, "ranker", 3, is_stopped=False)
        stub.send_signal(signal.SIGSTOP)
        wait_until(lambda: list_stubs(os.getpid())[stub.pid].is_stopped, 5)
        assert has_members(group)
        stub.kill()
        wait_until(lambda: not list_stubs(os.getpid()), 5)
        assert not has_members(group)
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.parametrize(
    ("version", "core", "is_refused"),
    [((2, 51, 0), "_core", True), ((2, 51, 0), "core", False), ((2, 52, 0), "_core", False)],
)
def test_numpy_2_is_refused_where_the_python_backend_cannot_use_it(tmp_path, version, core, is_refused):
    """The place of numpy is all that is looked at; `make test-numpy2` starts a real server with a real numpy 2."""
    library = tmp_path / "site-packages" / "numpy" / core / "umath.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(4096))
    code = "import mmap, sys; file = open(sys.argv[1], 'r+'); held = mmap.mmap(file.fileno(), 0); print(); input()"
    with subprocess.Popen([sys.executable, "-u", "-c", code, library], stdin=-1, stdout=-1) as stub:
        assert stub.stdout is not None
        assert stub.stdout.readline() == b"\n"
        words = rf"2\.51\.0 needs numpy 1 .* from {tmp_path}/site-packages: .*'numpy<2'"
        with pytest.raises(ServerError, match=words) if is_refused else contextlib.nullcontext():
            check_numpy(version, [stub.pid])
        stub.kill()


@pytest.fixture
def regions(tmp_path, monkeypatch):
    """A folder in place of /dev/shm."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    return tmp_path


def test_regions_of_a_server_that_lives_are_not_touched(regions):
    claim = shared_memory.claim("aa")
    (regions / "kvcast_aa_1").touch()
    assert shared_memory.remove_leftovers() == []
    assert (regions / "kvcast_aa_1").exists()
    os.close(claim)


def test_regions_of_a_server_that_is_gone_are_removed_and_its_claim_with_them(regions):
    os.close(shared_memory.claim("aa"))
    for name in ("kvcast_aa_1", "kvcast_aa_2", "kvcast_aab_1", "kvcast_bb_1", "triton_python_backend_shm_1", "other"):
        (regions / name).touch()
    assert shared_memory.remove_leftovers() == ["aa"]
    left = {path.name for path in regions.iterdir()}
    assert left == {"kvcast_aab_1", "kvcast_bb_1", "triton_python_backend_shm_1", "other"}, "none of these had an owner"


def test_a_claim_is_held_as_long_as_any_process_has_it(regions):
    claim = shared_memory.claim("aa")
    child = subprocess.Popen(["sleep", "60"], pass_fds=(claim,))
    os.close(claim)
    assert shared_memory.remove_leftovers() == []
    child.kill()
    child.wait()
    assert shared_memory.remove_leftovers() == ["aa"]
    assert not list(regions.iterdir())


def test_a_server_that_stops_removes_its_regions_and_its_claim(regions):
    claim = shared_memory.claim("aa")
    (regions / "kvcast_aa_1").touch()
    shared_memory.remove_regions("aa")
    assert [path.name for path in regions.iterdir()] == ["kvcast_aa_owner"]
    shared_memory.release("aa")
    os.close(claim)
    assert not list(regions.iterdir())


def test_a_link_in_place_of_an_owners_file_is_not_followed(regions, tmp_path_factory):
    """Everybody may write to /dev/shm."""
    victim = tmp_path_factory.mktemp("elsewhere") / "file"
    victim.write_text("precious")
    (regions / "kvcast_aa_owner").symlink_to(victim)
    (regions / "kvcast_aa_1").touch()
    assert shared_memory.remove_leftovers() == []
    with pytest.raises(ServerError, match="cannot be made"):
        shared_memory.claim("aa")
    assert (regions / "kvcast_aa_1").exists()
    assert victim.read_text() == "precious"


def test_a_shared_memory_that_is_too_small_is_one_sentence(regions):
    shared_memory.check_room(1)
    with pytest.raises(ServerError, match=r"expected 1000000000 MB free .* got \d+ MB: make it larger \(docker run"):
        shared_memory.check_room(10**15)


def test_a_name_that_would_match_everybodys_regions_is_not_an_owners(regions):
    claim = shared_memory.claim("aa")
    for name in ("kvcast_*_owner", "kvcast_[a]a_owner", "kvcast_a?_owner", "kvcast__owner", "kvcast_aa_1"):
        (regions / name).touch()
    assert shared_memory.remove_leftovers() == []
    assert (regions / "kvcast_aa_1").exists()
    os.close(claim)


def test_regions_can_be_hidden_from_other_users(regions):
    for name in ("kvcast_aa_1", "kvcast_bb_1"):
        (regions / name).touch(mode=0o644)
    shared_memory.hide_regions("aa")
    assert [stat.S_IMODE((regions / name).stat().st_mode) for name in ("kvcast_aa_1", "kvcast_bb_1")] == [0o600, 0o644]


def read_config(view: View, model: str) -> ModelConfig:
    return text_format.Parse((view.folder / model / "config.pbtxt").read_text(), ModelConfig())


def test_an_ensemble_names_the_versions_of_its_steps(tiny_repository, tmp_path):
    view = View(tiny_repository, tmp_path / "view", find_models(["ranker"]))
    view.pin("ranker", {"user_encoder": 7, "doc_fusion": 8}, "ranker_trial")
    for name, versions in (("ranker", [-1, -1]), ("ranker_trial", [7, 8])):
        config = read_config(view, name)
        assert config.name == name
        assert [step.model_version for step in config.ensemble_scheduling.step] == versions


@pytest.mark.parametrize(
    ("line", "words"),
    [("colour: 1", 'has no field named "colour"'), ("max_batch_size: '8'", "Couldn't parse integer"), ("{", "'{'")],
)
def test_a_configuration_that_triton_would_not_read_is_named(tiny_repository, tmp_path, line, words):
    own = Path(shutil.copytree(tiny_repository, tmp_path / "own"))
    config = own / "doc_fusion" / "config.pbtxt"
    config.write_text(f"{line}\n")
    with pytest.raises(ServerError, match=rf"doc_fusion/config\.pbtxt:1:.*{re.escape(words)}"):
        View(own, tmp_path / "view", find_models(["doc_fusion"]))


def test_parameters_are_set_in_the_view_alone(tiny_repository, tmp_path):
    config = tiny_repository / "user_encoder" / "config.pbtxt"
    before, models = config.read_text(), find_models(["ranker"])
    view = View(
        tiny_repository, tmp_path / "view", models, {"user_kv_cache_megabytes": "12.5", "intra_op_threads": "3"}
    )
    view.renew("user_encoder")
    encoder, fusion = (read_config(view, name).parameters for name in ("user_encoder", "doc_fusion"))
    assert encoder["user_kv_cache_megabytes"].string_value == "12.5"
    assert "user_kv_cache_megabytes" not in fusion
    assert encoder["intra_op_threads"].string_value == fusion["intra_op_threads"].string_value == "3"
    assert (encoder["KVCAST_LOADED"].string_value, fusion["KVCAST_LOADED"].string_value) == ("2", "1")
    assert config.read_text() == before
    with pytest.raises(ServerError, match=r"parameter colour: expected one of .*user_kv_cache_megabytes"):
        View(tiny_repository, tmp_path / "other", models, {"colour": "red"})


@pytest.mark.parametrize("text", ["colour", "a=b c", 'a="', "=1", "A=1"])
def test_a_parameter_is_a_name_and_a_value(text, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--set", text])
    assert f"expected NAME=VALUE, got {text!r}" in capsys.readouterr().err


def test_a_parameter_is_found_however_it_is_written(tiny_repository, tmp_path):
    own = Path(shutil.copytree(tiny_repository, tmp_path / "own"))
    config = own / "doc_fusion" / "config.pbtxt"
    config.write_text(
        config.read_text()
        + '# parameters { key: "remark" value { string_value: "1" } }\n'
        + 'parameters: {\n  key: "late"\n  value: {\n    string_value: "1"\n  }\n}\n'
    )
    view = View(own, tmp_path / "view", find_models(["doc_fusion"]), {"late": "2"})
    assert read_config(view, "doc_fusion").parameters["late"].string_value == "2"
    for name in ("remark", "history", "scores"):  # a comment, and tensors of an ensemble's maps
        with pytest.raises(ServerError, match=f"parameter {name}: expected one of .*late"):
            View(own, tmp_path / name, find_models(["ranker"]), {name: "2"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log_requests": 1.5}, "--log-requests: expected `float` <= 1.0, got 1.5"),
        ({"shadow": -0.1}, "--shadow: expected `float` >= 0.0, got -0.1"),
        ({"leave_seconds": -1}, "--leave-seconds: expected `float` >= 0.0, got -1"),
        ({"drain_seconds": float("nan")}, "--drain-seconds: expected `float` >= 0.0, got nan"),
        ({"in_flight": 0}, "--in-flight: expected `int` >= 1, got 0"),
        ({"waiting": -1}, "--waiting: expected `int` >= 0, got -1"),
        ({"http_port": "x"}, "--http-port: expected `int`, got 'x'"),
        ({"leave_seconds": 3, "is_guarded": False}, "--leave-seconds: the gateway does that: expected no --unguarded"),
        ({"log_requests": 1, "is_guarded": False}, "--log-requests: the gateway does that: expected no --unguarded"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_starts(tmp_path, changes, words):
    settings = dataclasses.replace(ServeConfig(tmp_path), **changes)
    with pytest.raises(KvcastError, match=re.escape(words)):
        TritonServer(settings).start()


class SlowStream(io.StringIO):
    """One that writes when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = threading.Event()

    def write(self, text: str) -> int:
        self.reads.wait(10)
        return super().write(text)


def test_a_log_that_nobody_reads_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("kvcast.server.log.WAITING_LINES", 5)
    monkeypatch.setattr("kvcast.server.log.FLUSHED_WITHIN_SECONDS", 0.1)
    stream, logger = SlowStream(), logging.getLogger("kvcast.gateway")
    with open_log(stream=stream):
        for number in range(20):
            logger.info(f"line {number}")
    assert not stream.getvalue()
    with open_log(stream=stream):
        for number in range(20):
            logger.info(f"line {number}")
        stream.reads.set()
        wait_until(lambda: "line 4\n" in stream.getvalue(), 5)
        logger.info("last")
    text = stream.getvalue()
    assert "line 0\n" in text
    assert "last\n" in text
    assert re.search(r"kvcast: 1[45] lines before this one were dropped: the log", text)


def write_log(line_format: str) -> list[str]:
    stream = io.StringIO()
    with open_log(line_format, stream):
        logging.getLogger("kvcast.server.supervisor").warning("a process died")
        log_triton('E1121 23:45:12.0 300 model_lifecycle.cc:642] "failed"')
        log_triton("I was never so formatted")
        logging.getLogger("kvcast.gateway").info('{"request_id": "x"}')
    return stream.getvalue().splitlines()


def test_a_log_of_text_has_the_lines_as_they_are():
    assert write_log("text") == [
        "kvcast: a process died",
        'E1121 23:45:12.0 300 model_lifecycle.cc:642] "failed"',
        "I was never so formatted",
        '{"request_id": "x"}',
    ]


def test_a_log_of_json_has_levels_and_sources():
    *lines, request = (json.loads(line) for line in write_log("json"))
    assert [(line["level"], line["source"]) for line in lines] == [
        ("WARNING", "server"), ("ERROR", "tritonserver"), ("INFO", "tritonserver")
    ]  # fmt: skip
    assert lines[0]["message"] == "a process died"
    assert datetime.datetime.fromisoformat(lines[0]["time"]).tzinfo is not None
    assert request == {"request_id": "x"}


def test_a_port_that_speaks_something_else_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"no HTTP\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert read_state(f"127.0.0.1:{listener.getsockname()[1]}") is None

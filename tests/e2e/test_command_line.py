"""`kvcast rank` against a running server, and the commands of the README, run as written."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcast.client import RankerClient
from kvcast.client.__main__ import main
from kvcast.protocol.config import load_config
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import USER_ENCODER
from kvcast.synthetic import ClickLog
from kvcast.train.study import write_table
from perf.report import write_headline, write_reuse_headline
from tests.conftest import make_environment
from tests.support import TOLERANCE

ROOT = Path(__file__).parents[2]
CONFIG = load_config("tiny")


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_text(ClickLog(CONFIG.schema, seed=3).draw_request(25, 12).to_json(CONFIG.schema))
    return path


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_json_output_holds_all_scores(server, request_file, capsys, protocol):
    address = server.grpc_address if protocol == "grpc" else server.http_address
    assert main([str(request_file), "--json", "--top", "3", "--protocol", protocol, "--address", address]) == 0
    printed = json.loads(capsys.readouterr().out)
    request = RankRequest.from_json(request_file.read_text(), CONFIG.schema)
    with RankerClient(server.grpc_address, model="ranker_full") as client:
        full = client.rank(request.history, request.candidates)
    np.testing.assert_allclose(printed["scores"], full.scores, rtol=0, atol=TOLERANCE)
    assert [row["index"] for row in printed["top"]] == [each.index for each in full.top(3)]
    assert printed["config"] == "tiny"
    assert printed["milliseconds"] > 0


def test_the_table_shows_the_best_first(server, request_file, capsys):
    assert main([str(request_file), "--top", "4", "--address", server.grpc_address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 candidates after 25 events, ranked in ")
    scores = [float(line.split()[2]) for line in lines[4:]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)


def test_standard_input(server, request_file):
    command = [sys.executable, "-m", "kvcast", "rank", "-", "--json", "--address", server.grpc_address]
    text = request_file.read_text()
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["scores"]) == 12


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (lambda table: table["candidates"].clear(), 2, "expected N = 1 to 64 candidates, got 0"),
        (lambda table: table["history"][0].update(item=500), 2, "expected field 'item' within 0..499, got 500"),
        (lambda table: table["history"][0].pop("action"), 2, "history[0]: expected the keys ['action', 'item']"),
        (lambda table: table.update(history=table["history"] * 4), 2, "expected at most L = 96 events, got 100"),
    ],
)
def test_a_wrong_request_is_exit_status_2(server, request_file, capsys, change, status, words):
    table = json.loads(request_file.read_text())
    change(table)
    request_file.write_text(json.dumps(table))
    assert main([str(request_file), "--address", server.grpc_address]) == status
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_served_is_the_servers_fault(server, request_file, capsys):
    for protocol, address in (("grpc", server.grpc_address), ("http", server.http_address)):
        assert main([str(request_file), "--protocol", protocol, "--address", address, "--model", "other"]) == 4
        assert "MODELS" in capsys.readouterr().err


def test_the_served_manifest_is_the_exported_one(server, tiny_repository):
    exported = (tiny_repository / USER_ENCODER.name / "1" / "manifest.json").read_text()
    for protocol, address in (("grpc", server.grpc_address), ("http", server.http_address)):
        with RankerClient(address, protocol=protocol) as client:
            assert client.get_manifest().to_json() == exported


def test_the_shipped_example_is_the_generators():
    command = [sys.executable, "-m", "kvcast", "clicklog", "--user", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "client" / "request.json").read_text()
    request = RankRequest.from_json(printed, load_config("demo").schema)
    assert request.history.shape == (30, 4)
    assert request.candidates.shape == (40, 4)


def test_kvcast_help_lists_the_commands_and_each_has_help():
    listing = subprocess.run([sys.executable, "-m", "kvcast", "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^  (\w+) ", listing.stdout, re.MULTILINE)
    assert {"export", "serve", "rank", "demo", "clicklog"} <= set(commands)
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "kvcast", command, "--help"], capture_output=True, text=True, check=True
        )
        assert "usage: " in done.stdout


def read_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_readme_does_what_it_says(demo, tmp_path):
    """Every command of the README in order, on free ports; `make test` itself only has to exist."""
    environment = make_environment()
    http, grpc = environment["HTTP_PORT"], environment["GRPC_PORT"]

    def run(block: str) -> str:
        block = block.replace("127.0.0.1:8000", f"127.0.0.1:{http}").replace("127.0.0.1:8001", f"127.0.0.1:{grpc}")
        block = re.sub(r"kvcast rank (.*--protocol http)", rf"kvcast rank --address 127.0.0.1:{http} \1", block)
        block = re.sub(r"kvcast rank (?!--address)", f"kvcast rank --address 127.0.0.1:{grpc} ", block)
        block = block.replace("build/tiny", str(tmp_path / "tiny")).replace(
            "build/releases", str(tmp_path / "releases")
        )
        block = block.replace("kvcast probe", f"kvcast probe --address 127.0.0.1:{grpc}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    readme = (ROOT / "README.md").read_text()
    demonstrate, rank, export = read_blocks(ROOT / "README.md", "sh")
    assert demonstrate.strip() == "make demo"
    for command in ("make test", "make serve", "sh client/curl.sh", "python -m perf model --config seed"):
        assert f"`{command}`" in readme
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```\n<!-- /demo -->", readme, re.DOTALL)
    assert shown is not None
    assert shown[1].count("\n") > 10
    assert set(shown[1].splitlines()) <= set(demo.printed.splitlines()), "a shortened output of make demo"
    run("make --dry-run test")
    serving = subprocess.Popen(
        ["make", "serve"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    try:
        assert serving.stdout is not None
        assert any("Ctrl-C stops it" in line for line in serving.stdout)
        ranked = run(rank)
        assert ranked.startswith("ready: ranker at 127.0.0.1")
        assert ranked.count("rank      item") == 3
        assert "30 events were cached already" in ranked  # the rankings before have kept them
        assert "cache hit: encoded in 0.0 ms, scored in" in ranked
        assert len(json.loads(ranked.splitlines()[-1])["scores"]) == 5
        answered = json.loads(run(f"sh client/curl.sh 127.0.0.1:{http}"))
        (example,) = read_blocks(ROOT / "README.md", "python")
        printed = run(f"python - <<'END'\n{example}\nEND")
        scores = np.array(answered["outputs"][0]["data"], np.float32)
        np.testing.assert_allclose(
            [float(number) for number in re.findall(r"-?\d+\.\d+", printed.splitlines()[0])], scores, atol=TOLERANCE
        )
        assert "CacheResult.HIT" in printed
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=20)
    assert "ideal speedup" in run("python -m perf model --config seed")
    assert re.search(r"active +1 .* tiny ", run(export))
    assert (tmp_path / "tiny" / "doc_fusion" / "1" / "manifest.json").exists()


def test_the_readme_shows_the_headline_of_the_committed_run():
    result = json.loads((ROOT / "perf" / "results" / "bench.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert write_headline(result) in readme
    kept = json.loads((ROOT / "perf" / "results" / "bench-kept.json").read_text())
    assert write_reuse_headline(kept) in readme
    assert not result["quick"]
    assert not kept["quick"]


def test_documents_show_the_committed_numbers_and_link_to_files_that_exist():
    result = json.loads((ROOT / "docs" / "results" / "mask_effect.json").read_text())
    mask = (ROOT / "docs" / "mask.md").read_text()
    for row in result["rows"]:
        keys = [f"{value:.2g}" for value in row["key_difference_by_layer"]]
        differences = [f"{row[f'score_difference_{kind}']:.1e}" for kind in ("max", "mean")]
        cells = [str(row["history"]), *differences, f"{row['score_deviation']:.2f}", *keys]
        assert f"| {' | '.join(cells)} |" in mask
    study = json.loads((ROOT / "docs" / "results" / "mask_study.json").read_text())
    assert write_table(study) in mask
    assert study["command"] in mask.replace(" \\\n  ", " "), "a long command, continued on the next line"
    *_, last = map(json.loads, (ROOT / "docs" / "results" / "demo_training.jsonl").read_text().splitlines())
    training = (ROOT / "docs" / "training.md").read_text()
    for name, best in (("popularity", ""), ("best", "**")):
        metrics = last[f"{name}_test"]
        cells = [f"{best}{metrics[each]:.3f}{best}" for each in ("auc", "request_auc", "ndcg_at_10")]
        assert f" | {' | '.join(cells)} |" in training
    for document in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"

"""`make demo` and its weights through a real server: its output, and the ranking of unseen users."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from kvcast.client import RankerClient
from kvcast.demo import LOG_SEED, main
from kvcast.protocol.config import load_config
from kvcast.protocol.request import RankRequest
from kvcast.server import TritonServer
from kvcast.synthetic import Habits, PlantedLog, PlantedRows, Shop
from kvcast.train.batches import score_requests
from kvcast.train.log import read_log
from kvcast.train.metrics import score_by_popularity
from kvcast.train.requests import Requests
from tests.conftest import Demo, make_settings
from tests.support import TOLERANCE, find_free_ports

ROOT = Path(__file__).parents[2]
CONFIG = load_config("demo")
SHOP = Shop(CONFIG.schema)
TRAINING_SEED, HELD_OUT_SEED = 1, 20
ASKED = 400


@pytest.fixture(scope="module")
def served(demo: Demo) -> Iterator[TritonServer]:
    settings = dataclasses.replace(make_settings(demo.repository), models=["ranker"], config=CONFIG.name)
    with TritonServer(settings) as running:
        yield running


@pytest.fixture(scope="module")
def rows() -> PlantedRows:
    """A log of users whom the weights have never seen, in the shop that they know."""
    return PlantedLog(SHOP, Habits(users=120), seed=HELD_OUT_SEED).draw_rows()


@pytest.fixture(scope="module")
def requests(rows: PlantedRows, tmp_path_factory: pytest.TempPathFactory) -> Requests:
    """The requests of that log, read as training reads them."""
    path = tmp_path_factory.mktemp("held-out") / "log.parquet"
    rows.write(path)
    return Requests(read_log(path, CONFIG.schema), CONFIG.schema, CONFIG.limits)


def test_the_weights_are_small_and_say_what_they_are():
    assert CONFIG.weights is not None
    assert CONFIG.weights.stat().st_size <= 4_000_000
    with safe_open(CONFIG.weights, framework="np") as file:
        metadata = file.metadata()
    assert metadata["kvcast.config"] == "demo"
    assert metadata["kvcast.mask"] == "target_blind"
    assert metadata["kvcast.history"] == "encoded"


def test_the_command_that_made_the_weights_names_another_seed_than_the_demo_and_these_tests():
    guide = (ROOT / "docs" / "training.md").read_text()
    (seed,) = re.findall(r"kvcast clicklog --config demo --log .* --seed (\d+)", guide)
    assert int(seed) == TRAINING_SEED
    assert len({TRAINING_SEED, HELD_OUT_SEED, LOG_SEED}) == 3


def test_the_demo_shows_a_ranking_beside_the_users_preferences(demo: Demo):
    *_, shown = demo.printed.partition("ready after")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    (likes,) = re.findall(r"^  likes +(.*)$", demo.printed, re.MULTILINE)
    log = PlantedLog(SHOP, Habits(), LOG_SEED)
    assert likes.split(", ") == [SHOP.name_category(each) for each in log.list_tastes(1)]
    places = [line for line in lines if re.match(r" +\d+ +-?\d+\.\d\d ", line)]
    assert len(places) == 13
    for line in places:
        item = int(line.split()[2])
        category = SHOP.name_category(int(SHOP.category[item]))
        assert SHOP.name_brand(int(SHOP.brand[item])) in line
        assert category in line
        assert ("♥" in line) == (category in likes.split(", "))
    (top, everywhere) = re.findall(r"likes: (\d+) of the top 10, (\d+) of all 40 candidates", demo.printed)[0]
    assert int(top) == sum("♥" in line for line in places[:10])
    assert int(top) / 10 > int(everywhere) / 40 + 0.2, "the model ranks what the user likes first"
    assert "the server is stopped" in demo.printed


def test_another_configuration_is_shown_as_ids_and_scores(tiny_repository: Path):
    http, grpc, metrics = map(str, find_free_ports(3))
    command = [sys.executable, "-m", "kvcast", "demo", "--config", "tiny", "--repository", str(tiny_repository)]
    command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"^ +\d+ +\d+ +-?\d\.\d{5}$", printed, re.MULTILINE)) == 10
    assert "the server is stopped" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user", "0"], "user: expected 1 to 2000, got 0"),
        (["--user", "2", "--config", "tiny"], "only demo has users, got --user 2 and --config tiny"),
    ],
)
def test_an_unknown_user_is_reported_before_anything_starts(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        main([*options, "--repository", str(tmp_path / "repository")])
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_shipped_example_is_what_the_demo_ranks(demo: Demo, served: TritonServer):
    text = (ROOT / "client" / "request.json").read_text()
    request = RankRequest.from_json(text, CONFIG.schema)
    with RankerClient(served.grpc_address) as client:
        ranking = client.rank(request.history, request.candidates)
    shown = re.findall(r"^ +(\d+) +(-?\d+\.\d\d) +(\d+) ", demo.printed, re.MULTILINE)
    best = ranking.top(10)
    assert [int(item) for _, _, item in shown[:10]] == [each.item for each in best]
    np.testing.assert_allclose([float(score) for _, score, _ in shown[:10]], [each.score for each in best], atol=0.006)


@pytest.mark.parametrize("name", ["rank.py", "rank_async.py", "prefetch.py", "curl.sh"])
def test_the_client_examples_run_as_they_stand(served: TritonServer, name: str):
    program = [sys.executable] if name.endswith(".py") else ["sh"]
    address = served.http_address if name == "curl.sh" else served.grpc_address
    done = subprocess.run([*program, ROOT / "client" / name, address], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    request = RankRequest.from_json((ROOT / "client" / "request.json").read_text(), CONFIG.schema)
    with RankerClient(served.grpc_address) as client:
        best = client.rank(request.history, request.candidates).top(1)[0]
        two = client.rank([[690, 8, 49, 2], [797, 11, 47, 4]], [[673, 19, 85, 31], [79, 9, 115, 60]]).scores
    if name == "curl.sh":
        np.testing.assert_allclose(json.loads(done.stdout)["outputs"][0]["data"], two, rtol=0, atol=TOLERANCE)
        return
    shown = re.findall(rf"item +{best.item} +(-?\d+\.\d+)", done.stdout)
    np.testing.assert_allclose(float(shown[-1]), best.score, rtol=0, atol=2 * TOLERANCE)
    assert name != "prefetch.py" or "rank: cache hit" in done.stdout


def test_unseen_users_are_ranked_well(demo: Demo, served: TritonServer, rows: PlantedRows, requests: Requests):
    half = len(requests) // 2  # in order of time
    chosen = np.sort(np.random.default_rng(0).choice(np.arange(half, len(requests)), ASKED, replace=False))
    asked = requests.select(chosen)
    with RankerClient(served.grpc_address) as client:
        scores = [client.rank(each.history, each.candidates).scores for each in asked]
    in_torch = score_requests(demo.network, asked, "target_blind", 64, torch.device("cpu"))
    np.testing.assert_allclose(np.concatenate(scores), np.concatenate(in_torch), rtol=0, atol=TOLERANCE)
    label = np.concatenate([each.labels for each in asked])

    def measure(of: list[npt.NDArray[np.float32]]) -> float:
        return float(roc_auc_score(label, np.concatenate(of)))

    popularity = measure(score_by_popularity(requests[:half], asked))
    bound = measure([rows.truth[asked.rows(index)] for index in range(len(asked))])
    auc = measure(scores)
    assert abs(auc - measure(in_torch)) < 1e-4
    assert popularity + 0.1 < auc < bound
    assert auc > 0.8


def test_histories_are_those_that_plain_python_reads_from_the_log(
    served: TritonServer, rows: PlantedRows, requests: Requests
):
    """Nothing of `Requests` decides what the served scores above are of."""
    table = [
        dict(zip(rows.columns, row, strict=True))
        for row in zip(*(each.tolist() for each in rows.columns.values()), strict=True)
    ]
    with RankerClient(served.grpc_address) as client:
        for index in np.linspace(len(requests) // 3, len(requests) - 1, 6).astype(int):
            request = requests[int(index)]
            own = [row for row in table if str(row["user"]) == request.user]
            before = [row for row in own if row["time"] < request.time and row["action"] != 0][-CONFIG.limits.history :]
            history = [[row[name] for name in ("item", "category", "price_bucket", "action")] for row in before]
            now = [row for row in own if row["time"] == request.time]
            candidates = [[row[name] for name in ("item", "category", "brand", "price_bucket")] for row in now]
            assert [row["label"] for row in now] == request.labels.tolist()
            ours = client.rank(history, candidates).scores
            theirs = client.rank(request.history, request.candidates).scores
            np.testing.assert_array_equal(history, request.history)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)

"""Readers, on small files in the formats that the data sets have, and the command that makes logs of them."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcast.networks.interface import build_network
from kvcast.networks.weights import load_weights
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.schema import FeatureSchema, Field, Limits
from kvcast.train import log_command
from kvcast.train.__main__ import main as train
from kvcast.train.log import LogError, read_log, write_log
from kvcast.train.readers import (
    READERS,
    RawLog,
    Table,
    make_log,
    read_kuairand,
    read_movielens,
    read_recbole,
    read_table,
)
from kvcast.train.readers.movielens import GENRES
from kvcast.train.readers.vocabulary import MadeLog
from kvcast.train.requests import Requests


def make_schema(candidate_fields: str, size: int = 64) -> FeatureSchema:
    fields = tuple(Field(name, size) for name in candidate_fields.split())
    return FeatureSchema(history_fields=(fields[0], Field("action", 64)), candidate_fields=fields)


MOVIES = [
    (1, "Toy Story (1995)", "Adventure|Animation|Children"),
    (2, 'Jumanji, the "first" (1995)', "Adventure|Children"),
    (3, "Les Misérables (1998)", "Drama"),
    (4, "A film of no year", "(no genres listed)"),
]
# user, movie, stars, time
RATINGS = [
    (1, 1, 4.0, 100),
    (1, 2, 3.5, 200),
    (2, 3, 5.0, 150),
    (2, 1, 0.5, 150),
    (2, 4, 4.5, 300),
    (1, 9, 2.0, 400),
    (1, 3, 4.0, 400),
]


def write_movielens_csv(folder: Path, ratings=RATINGS) -> Path:
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    quoted = [(number, '"' + title.replace('"', '""') + '"', genres) for number, title, genres in MOVIES]
    lines = ["movieId,title,genres", *(",".join(map(str, row)) for row in quoted)]
    (folder / "movies.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder


def write_movielens_dat(folder: Path) -> Path:
    lines = ["::".join([str(user), str(movie), f"{stars:g}", str(time)]) for user, movie, stars, time in RATINGS]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    lines = ["::".join(map(str, row)) for row in MOVIES]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder


def write_movielens_100k(folder: Path) -> Path:
    ratings = ["\t".join([str(user), str(movie), f"{stars:g}", str(time)]) for user, movie, stars, time in RATINGS]
    (folder / "u.data").write_text("\n".join(ratings) + "\n")
    films = [
        "|".join(
            [
                str(number),
                title,
                "01-Jan-1995",
                "",
                "http://film",
                *("01"[name.removesuffix("'s") in genres] for name in GENRES),
            ]
        )
        for number, title, genres in MOVIES
    ]
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    return folder


def name_rows(made: MadeLog, field: str) -> list[str | None]:
    """Return the names that a column's ids stand for."""
    names = {number: name for name, number in made.vocabularies[field].items()}
    return [names.get(int(number)) for number in made.columns[field]]


@pytest.mark.parametrize("write", [write_movielens_csv, write_movielens_dat, write_movielens_100k])
def test_movielens_is_read_from_both_formats(tmp_path, write, monkeypatch):
    monkeypatch.setattr("kvcast.train.readers.vocabulary.VOCABULARY_SHARE", 1)
    made = make_log(read_movielens(write(tmp_path), "stop"), make_schema("item category genres year colour"))
    assert made.columns["user"].tolist() == [1, 2, 2, 1, 2, 1, 1]
    assert made.columns["time"].tolist() == [100, 150, 150, 200, 300, 400, 400]
    assert made.columns["label"].tolist() == [1, 1, 0, 0, 1, 0, 1]
    assert made.columns["action"].tolist() == [8, 10, 1, 7, 9, 4, 8]
    assert name_rows(made, "item") == ["1", "3", "1", "2", "4", "9", "3"]
    assert name_rows(made, "category") == ["Adventure", "Drama", "Adventure", "Adventure", None, None, "Drama"]
    assert name_rows(made, "genres")[0].replace("'s", "") == "Adventure|Animation|Children"
    assert name_rows(made, "year") == ["1995", "1998", "1995", "1995", None, None, "1998"]
    assert not made.columns["colour"].any()
    assert made.titles[str(made.vocabularies["item"]["3"])] == "Les Misérables (1998)"
    assert made.titles[str(made.vocabularies["item"]["2"])] == 'Jumanji, the "first" (1995)'
    notes = "\n".join(made.notes)
    assert "1 ratings are of movies that" in notes
    assert "0 in every row: colour" in notes


def test_bad_ratings_are_named_or_skipped(tmp_path):
    bad = [(1, 2, 3.3, 500), (1, 2, 6, 500), (1, "x", 4, 500), (1, 2, 4, -5)]
    folder = write_movielens_csv(tmp_path, [*RATINGS, *bad])
    with pytest.raises(LogError) as error:
        read_movielens(folder, "stop")
    for line in (
        "4 of 11 rows are bad",
        "1 × rating is not a number of half stars: line 9 (got '3.3')",
        "1 × rating is not within 0.5..5: line 10 (got '6')",
        "1 × movieId is not an integer: line 11 (got 'x')",
        "1 × timestamp is negative: line 12 (got '-5')",
    ):
        assert line in str(error.value)
    raw = read_movielens(folder, "skip")
    assert len(raw.time) == len(RATINGS)
    assert "4 bad rows skipped" in "\n".join(raw.notes)


def test_a_pause_option_groups_rows_into_requests(tmp_path):
    raw = read_movielens(write_movielens_csv(tmp_path), "stop")
    schema = make_schema("item")
    assert "request" not in make_log(raw, schema).columns
    made = make_log(raw, schema, pause=100)
    groups: dict[int, list[tuple[int, int]]] = {}
    rows = zip(made.columns["request"].tolist(), made.columns["user"], made.columns["time"], strict=True)
    for request, user, time in rows:
        groups.setdefault(request, []).append((user, time))
    sessions = [[(1, 100), (1, 200)], [(1, 400), (1, 400)], [(2, 150), (2, 150)], [(2, 300)]]
    assert sorted(groups.values()) == sessions


IMPRESSION_COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
VIDEO_COLUMNS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)


def write_kuairand(folder: Path) -> Path:
    first = [
        "7,100,20220408,400,1649400000123,1,0,0,0,0,0,1,5000,10400,0,0,0,0,1",
        "7,101,20220408,400,1649400000456,0,0,0,0,0,0,0,100,3000,0,0,0,0,1",
        "8,100,20220408,400,1649400001000,1,1,1,0,0,0,1,9000,10400,0,0,0,0,4",
    ]
    second = ["7,102,20220422,900,1650600000999,0,0,0,0,0,1,0,10,0,0,0,0,0,0"]
    videos = [
        '100,441,NORMAL,2020-07-08,ShortImport,1,10400.0,720,1280,989206467,4,"12,65"',
        "101,442,AD,2020-07-08,LongImport,1,,720,1280,1,4,65",
    ]
    for name, header, rows in (
        ("log_standard_4_08_to_4_21_pure.csv", IMPRESSION_COLUMNS, first),
        ("log_standard_4_22_to_5_08_pure.csv", IMPRESSION_COLUMNS, second),
        ("log_random_4_22_to_5_08_pure.csv", IMPRESSION_COLUMNS, ["this,is,not,read"]),
        ("video_features_basic_pure.csv", VIDEO_COLUMNS, videos),
    ):
        (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_kuairand_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcast.train.readers.vocabulary.VOCABULARY_SHARE", 1)
    schema = make_schema("item author category video_type upload_type tab duration")
    made = make_log(read_kuairand(write_kuairand(tmp_path), "stop"), schema)
    assert made.columns["user"].tolist() == [7, 7, 8, 7]
    assert made.columns["time"].tolist() == [1649400000, 1649400000, 1649400001, 1650600000]
    assert made.columns["label"].tolist() == [1, 0, 1, 0]
    assert made.columns["action"].tolist() == [2, 0, 6, 7]
    assert name_rows(made, "item") == ["100", "101", "100", "102"]
    assert name_rows(made, "author") == ["441", "442", "441", None]
    assert name_rows(made, "category") == ["12", "65", "12", None]
    assert name_rows(made, "video_type") == ["NORMAL", "AD", "NORMAL", None]
    assert made.columns["tab"].tolist() == [2, 2, 5, 1]
    assert made.columns["duration"].tolist() == [1 + int(2 * np.log2(11.4)), 5, 1 + int(2 * np.log2(11.4)), 1]
    assert "1 impressions are of videos without features" in made.notes


def test_a_bad_impression_is_named_with_its_file(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_kuairand(tmp_path / "data") / "log_standard_4_22_to_5_08_pure.csv"
    path.write_text(path.read_text() + "7,102,20220422,900,,2,0,0,0,0,0,0,10,0,0,0,0,0,0\n")
    with pytest.raises(LogError, match=rf"{path.name}: 1 of 2 rows are bad(.|\n)*time_ms is missing: line 3"):
        read_kuairand(tmp_path, "stop")
    raw = read_kuairand(tmp_path, "skip")
    assert len(raw.time) == 4
    assert "is_click is not 0 or 1" in "\n".join(raw.notes)


INTERACTIONS = """user_id:token	item_id:token	rating:float	timestamp:float	cluster:float_seq
u1	B00A	5	1400000000.0	1 2
u1	B00B	3	1400003600	1
u2	B00A	4	1400007200	1 2
u2	B00C	1	1400010800	2
"""
ITEMS = """item_id:token	brand:token	class:token_seq
B00A	"Quo	Books Poetry
B00B		Games
"""


def write_recbole(folder: Path, interactions: str = INTERACTIONS, items: str = ITEMS) -> Path:
    (folder / "shop.inter").write_text(interactions)
    (folder / "shop.item").write_text(items)
    return folder


HOURS = FeatureSchema((Field("item", 64), Field("action", 64), Field("hour", 10**6)), (Field("item", 64),))


def test_recbole_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcast.train.readers.vocabulary.VOCABULARY_SHARE", 1)
    fields = FeatureSchema(HOURS.history_fields, make_schema("item brand class_").candidate_fields)
    made = make_log(read_recbole(write_recbole(tmp_path), "stop", Table()), fields, time_field="hour")
    assert made.columns["user"].tolist() == ["u1", "u1", "u2", "u2"]
    assert made.columns["time"].tolist() == [1400000000, 1400003600, 1400007200, 1400010800]
    assert made.columns["label"].tolist() == [1, 0, 1, 0]
    assert name_rows(made, "item") == ["B00A", "B00B", "B00A", "B00C"]
    assert name_rows(made, "action") == ["5", "3", "4", "1"]
    assert name_rows(made, "brand") == ['"Quo', None, '"Quo', None]
    assert name_rows(made, "class_") == ["Books", "Games", "Books", None]
    assert np.diff(made.columns["hour"]).tolist() == [1, 1, 1]
    assert "1 rows are of items that shop.item does not list" in made.notes


TAOBAO = """1,B00A,26,pv,1511544070
1,B00B,26,cart,1511544071
"2",B00A,26,buy,1511544072
2,B00C,7,pv,1511544073
"""
TAOBAO_COLUMNS = ("user", "item", "category", "behavior", "time")


def read_text_table(folder: Path, text: str, bad_rows: str = "stop", **said: Any) -> RawLog:
    path = folder / "log.csv"
    path.write_text(text)
    return read_table(path, bad_rows, Table(**{"columns": TAOBAO_COLUMNS, "label": "behavior=cart,buy"} | said))


def test_a_file_without_a_header_is_read_by_the_order_of_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcast.train.readers.vocabulary.VOCABULARY_SHARE", 1)
    made = make_log(read_text_table(tmp_path, TAOBAO), make_schema("item category"))
    assert made.columns["user"].tolist() == ["1", "1", "2", "2"]
    assert made.columns["time"].tolist() == [1511544070, 1511544071, 1511544072, 1511544073]
    assert made.columns["label"].tolist() == [0, 1, 1, 0]
    assert name_rows(made, "item") == ["B00A", "B00B", "B00A", "B00C"]
    assert name_rows(made, "category") == ["26", "26", "26", "7"]
    assert name_rows(made, "action") == ["pv", "cart", "buy", "pv"]
    ratings = "A1,B00A,5.0,1400000000\nA2,B00B,3.0,1400000001\n"
    raw = read_text_table(tmp_path, ratings, columns=("user", "item", "rating", "time"), label="rating>=4")
    assert raw.label.tolist() == [1, 0]
    skipped = read_text_table(tmp_path, TAOBAO, columns=("user", "item", "-", "action", "time"), label="action=buy")
    assert sorted(skipped.values) == ["action", "item"]


def test_a_file_with_a_header_is_read_by_its_names(tmp_path):
    text = "timestamp\tvisitor\titem\tclicked\n1400000000123\tann\tshoe\t0\n1400000001000\tbob\that\t1\n"
    columns = ("user=visitor", "item=item", "time=timestamp", "label=clicked")
    raw = read_text_table(tmp_path, text, columns=columns, label="", separator="\t", milliseconds=True)
    assert (raw.users, raw.time.tolist()) == (("ann", "bob"), [1400000000, 1400000001])
    assert (raw.label.tolist(), raw.ids["action"].tolist()) == ([0, 1], [0, 1])
    plain = read_text_table(tmp_path, "user,time,item,label\nann,5,shoe,0\n", columns=(), label="")
    assert plain.values["item"].names == ("shoe",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,B00D,26,pv,soon", "time is not a number: line 5 (got 'soon')"),
        ("1,B00D,26,pv", "wrong number of columns: line 5 (got 4 instead of 5)"),
        ("1,B00D,26,pv,1511544070123", "time is no time in seconds (milliseconds: --milliseconds): line 5 (got"),
        ("1,,26,pv,1511544070", "item is missing: line 5 (got nothing)"),
        ("1,B00D,26,pv,-5", "time is negative: line 5 (got '-5')"),
    ],
)
def test_a_bad_row_of_any_file_is_named_by_its_line(tmp_path, row, words):
    with pytest.raises(LogError) as caught:
        read_text_table(tmp_path, TAOBAO + row + "\n")
    assert f"{tmp_path / 'log.csv'}: 1 of 5 rows are bad" in str(caught.value)
    assert words in str(caught.value)
    assert len(read_text_table(tmp_path, TAOBAO + row + "\n", "skip").time) == 4


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"columns": TAOBAO_COLUMNS[:4]}, "line 1: expected the 4 columns that are named, got 5"),
        ({"columns": ("user", "item", "a", "b", "c")}, "expected the columns user, item, time: missing time"),
        ({"columns": ("user", "item", "item", "time", "c")}, "there twice: item"),
        ({"columns": ("user", "item=x", "a", "time", "c")}, "expected name=header for all or for none"),
        ({"columns": ("user=1", "item=id", "time=pv")}, "missing id; got 1, B00A, 26, pv, 1511544070"),
        ({"label": ""}, "expected --label COLUMN=VALUE,VALUE or COLUMN>=NUMBER to say which rows are positive"),
        ({"label": "clicks=1"}, "one of the columns user, item, category, behavior, time; got 'clicks=1'"),
        ({"label": "behavior=bye"}, "expected values of behavior (buy, cart, pv), got bye"),
        ({"label": "behavior>=much"}, "expected a number after >=, got 'much'"),
        ({"label": "behavior>=2"}, "4 × behavior is not a number: line 1, 2, 3, 4 (got 'pv')"),
    ],
)
def test_what_is_said_of_a_file_and_is_not_so_is_reported(tmp_path, said, words):
    with pytest.raises(LogError) as caught:
        read_text_table(tmp_path, TAOBAO, **said)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("interactions", "words"),
    [
        (INTERACTIONS.replace("rating:float", "rating"), "line 1: expected name:type, of the types token, token_seq"),
        (
            INTERACTIONS.replace("timestamp:", "at:"),
            "expected the columns user_id, item_id, timestamp: missing timestamp",
        ),
        (INTERACTIONS.replace("1400003600", "then"), r"time is not a number: line 3 \(got 'then'\)"),
        (INTERACTIONS.replace("rating:float", "stars:float"), "expected --label COLUMN=VALUE"),
    ],
)
def test_bad_atomic_files_are_reported(tmp_path, interactions, words):
    with pytest.raises(LogError, match=rf"shop\.inter: (.|\n)*{words}"):
        read_recbole(write_recbole(tmp_path, interactions), "stop", Table())


def test_atomic_files_name_their_own_columns(tmp_path):
    with pytest.raises(LogError, match="expected none with --from recbole"):
        read_recbole(write_recbole(tmp_path), "stop", Table(columns=("user", "item", "time")))


def test_vocabularies_too_small_for_times_or_events_are_reported(tmp_path):
    raw = read_recbole(write_recbole(tmp_path), "stop", Table())
    small = FeatureSchema((Field("item", 64), Field("action", 4), Field("hour", 64)), (Field("item", 64),))
    with pytest.raises(LogError, match="action: expected a vocabulary of at least 5 for this data, got 4"):
        make_log(raw, small, time_field="hour")
    other = FeatureSchema((Field("item", 64), Field("deed", 64)), (Field("item", 64),))
    with pytest.raises(LogError, match=r"expected a field that makes rows events \(deed\) in the data, which has act"):
        make_log(raw, other)
    small = FeatureSchema((Field("item", 64), Field("hour", 64)), (Field("item", 64),))
    with pytest.raises(LogError, match="hour: expected a vocabulary of at least 388893 for this data, got 64"):
        make_log(raw, small, time_field="hour")


def test_hstu_trains_on_a_log_whose_impressions_have_times(tmp_path, capsys):
    """From a file to weights: half of the rows are mere impressions, and every row has an hour."""
    draw = np.random.default_rng(0)
    rows = [f"u{draw.integers(20)},B{draw.integers(40):03},{1000 * time},{draw.integers(2)}" for time in range(600)]
    source, log, out = tmp_path / "rows.csv", tmp_path / "log.parquet", tmp_path / "w.safetensors"
    source.write_text("\n".join(rows) + "\n")
    assert run(source, "--from", "csv", "--columns", "user,item,time,label", "--config", "tiny-hstu", "--out", log) == 0
    assert "hour: 1 + the time in hours, in every row" in capsys.readouterr().out
    config = load_config("tiny-hstu")
    columns = read_log(log, config.schema)
    assert (columns.ids["hour"] == 1 + columns.time // 3600).all()
    requests = Requests(columns, config.schema, config.limits, config.time_field)
    assert all((request.history[:, 1] > 0).all() for request in requests)
    assert requests.history_lengths.max() < 30 < columns.label.sum()
    assert train(["--config", "tiny-hstu", "--log", str(log), "--out", str(out), "--steps", "4"]) == 0
    load_weights(build_network(config), out)


@pytest.mark.parametrize("name", READERS)
def test_missing_files_are_reported_with_their_folder(tmp_path, name):
    with pytest.raises(LogError, match=f"{tmp_path}: expected .*, found n"):
        READERS[name](tmp_path, "stop")


def test_missing_columns_are_reported_with_their_file(tmp_path):
    folder = write_movielens_csv(tmp_path)
    (folder / "ratings.csv").write_text("userId,movieId,stars,timestamp\n1,1,4,100\n")
    with pytest.raises(LogError, match=r"ratings\.csv: expected the columns .*: missing rating"):
        read_movielens(folder, "stop")


def test_ids_are_given_by_frequency_in_the_early_rows(tmp_path):
    # Movie m is rated 70 - m times in the first part; in the last fifth there are others only.
    early = [(user, movie, 4, user) for movie in range(1, 70) for user in range(1, 71 - movie)]
    late = [(user, 900 + user % 3, 4, 10**6) for user in range(1, len(early) // 4 + 1)]
    made = make_log(read_movielens(write_movielens_csv(tmp_path, [*late, *early]), "stop"), make_schema("item", 64))
    vocabulary = made.vocabularies["item"]
    assert list(vocabulary.values()) == list(range(1, 64))
    assert list(vocabulary)[:3] == ["1", "2", "3"]
    assert not {"900", "901", "902"} & set(vocabulary)
    assert not made.columns["item"][made.columns["time"] == 10**6].any()
    assert "item: 63 of 72 values have an id" in "\n".join(made.notes)


CONFIG = """
name = "movies"
[network]
family = "transformer"
layers = 2
heads = 2
width = 32
[vocabularies]
item = 64
action = 64
category = 64
year = 128
[fields]
history = ["item", "action"]
candidates = ["item", "category", "year"]
[limits]
history = 16
candidates = 8
[workload]
history = 8
candidates = 4
"""


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    log_command.add_options(parser)
    return log_command.run(parser.parse_args([*map(str, arguments)]))


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_the_command_makes_a_log_that_trains(tmp_path, capsys, name):
    config = tmp_path / "movies.toml"
    config.write_text(CONFIG)
    write_movielens_csv(tmp_path)
    assert run(tmp_path, "--from", "movielens", "--config", config, "--out", tmp_path / name, "--pause", 10) == 0
    out = capsys.readouterr().out
    assert "7 rows of 2 users" in out
    assert "training 4 requests" in out
    schema = make_schema("item category")
    schema = FeatureSchema(schema.history_fields, (*schema.candidate_fields, Field("year", 128)))
    requests = Requests(read_log(tmp_path / name, schema), schema, Limits(history=16, candidates=8))
    assert [len(request.history) for request in requests] == [0, 0, 1, 2, 2]
    names = json.loads((tmp_path / "log.vocabularies.json").read_text())
    assert names["titles"][str(names["vocabularies"]["item"]["1"])] == "Toy Story (1995)"
    assert run(tmp_path / name, "--config", config) == 0
    assert capsys.readouterr().out.splitlines() == out.splitlines()[-2:]


def test_the_command_reports_skipped_rows(tmp_path, capsys):
    config = tmp_path / "movies.toml"
    config.write_text(CONFIG)
    path = tmp_path / "log.csv"
    path.write_text("user,time,item,category,year,action,label\nann,1,2,3,4,0,1\nann,2,2,3,4,0,5\n")
    with pytest.raises(LogError, match="1 of 2 rows are bad"):
        run(path, "--config", config)
    assert run(path, "--config", config, "--bad-rows", "skip") == 0
    assert "1 × label is not 0 or 1: line 3 (got '5')" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--from", "movielens"],
        ["--out", "x.parquet"],
        ["--from", "movielens", "--out", "x"],
        ["--from", "movielens", "--out", "x.parquet", "--label", "a=b"],
    ],
)
def test_the_command_rejects_invalid_options(tmp_path, options):
    with pytest.raises(KvcastError, match=r"go together|parquet|expected --from csv or recbole"):
        run(write_movielens_csv(tmp_path), "--config", "tiny", *options)
    with pytest.raises(LogError, match="missing user"):
        write_log(tmp_path / "x.csv", {}, make_schema("item"))

"""KuaiRand, as its authors pack it: `log_standard_*.csv` and `video_features_basic_*.csv` of one folder or its `data/`.

A row is an impression; its label is `is_click`, which in the feed of one column means that the video was played for a
while. Its time is `time_ms` in seconds. `action` is the strongest of what the user did, 0 if nothing. The logs of
randomly exposed videos (`log_random_*.csv`) are not read.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvcast.train.columns import Ids, LogError, OnBadRows, read_csv
from kvcast.train.readers.vocabulary import RawLog, Values, find_places, look_up

# What a user did → its id as `action`; of several the last one here counts.
ACTIONS = {
    "is_click": 1,
    "long_view": 2,
    "is_like": 3,
    "is_comment": 4,
    "is_forward": 5,
    "is_follow": 6,
    "is_hate": 7,
}
IMPRESSION = ("user_id", "video_id", "time_ms", "duration_ms", "tab", *ACTIONS)
# Column → the field that it becomes.
FEATURES = {"author_id": "author", "video_type": "video_type", "upload_type": "upload_type", "tag": "category"}
VIDEO = ("video_id", *FEATURES)
# Lengths of videos are told apart by half powers of two of seconds.
LONGEST_DURATION = 63


def read_kuairand(folder: Path, bad_rows: OnBadRows) -> RawLog:
    """Read impressions and videos.

    Offers the fields `item` (video), `author`, `category` (its first tag), `video_type`, `upload_type`, `tab` (where it
    was shown), `duration` and `action`.

    Raises:
        LogError: the files are not there, or not as documented; a row is bad and `bad_rows` is "stop".
    """
    parts = [_read_impressions(path, bad_rows) for path in _find_files(folder, "log_standard_*.csv")]
    rows = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
    videos = [_read_videos(path, bad_rows) for path in _find_files(folder, "video_features_basic_*.csv")]
    numbers, row = np.unique(rows["video"], return_inverse=True)
    place = find_places(np.concatenate([video for video, _, _ in videos]), numbers)[row]
    features = pa.concat_tables([table for _, table, _ in videos])
    values = {name: look_up(features[name], place) for name in features.column_names}
    values["item"] = Values(tuple(str(number) for number in numbers), row)
    unlisted = int((place < 0).sum())
    notes = [f"{unlisted} impressions are of videos without features"] if unlisted else []
    return RawLog(
        user=rows["user"],
        time=rows["time"],
        label=rows["label"],
        values=values,
        ids={name: rows[name] for name in ("action", "tab", "duration")},
        notes=(*(note for *_, skipped in [*parts, *videos] for note in skipped), *notes),
    )


def _find_files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"data/{pattern}"))
    if not files:
        raise LogError(f"{folder}: expected files {pattern} here or in data/, found none")
    return files


def _read_impressions(path: Path, bad_rows: OnBadRows) -> tuple[dict[str, Ids], list[str]]:
    columns = read_csv(path, IMPRESSION)
    user, video, milliseconds = (columns.read_integers(name) for name in ("user_id", "video_id", "time_ms"))
    columns.reject("time_ms", "is negative", milliseconds < 0)
    duration, tab = columns.read_integers("duration_ms"), columns.read_integers("tab")
    columns.reject("duration_ms", "is negative", duration < 0)
    columns.reject("tab", "is negative", tab < 0)
    did = {name: columns.read_flags(name) for name in ACTIONS}
    columns.settle(bad_rows)
    halves = (2 * np.log2(1 + np.maximum(duration, 0) / 1000)).astype(np.int64)
    rows = {
        "user": user,
        "video": video,
        "time": milliseconds // 1000,
        "label": did["is_click"],
        "action": np.max([number * did[name] for name, number in ACTIONS.items()], axis=0),
        "tab": 1 + tab,
        "duration": 1 + np.minimum(halves, LONGEST_DURATION - 1),
    }
    return {name: column[columns.good] for name, column in rows.items()}, columns.describe_skipped()


def _read_videos(path: Path, bad_rows: OnBadRows) -> tuple[Ids, pa.Table, list[str]]:
    columns = read_csv(path, VIDEO)
    video = columns.read_integers("video_id")
    columns.settle(bad_rows)
    table = columns.table.filter(pa.array(columns.good))
    features = {field: table[name] for name, field in FEATURES.items()}
    features["category"] = pc.list_element(pc.split_pattern(pc.fill_null(features["category"], ""), ","), 0)
    return video[columns.good], pa.table(features), columns.describe_skipped()

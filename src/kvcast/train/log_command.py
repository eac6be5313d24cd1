"""Print what a log contains and whether it fits a model, or make one from a data set in a local folder.

Data sets: docs/click-logs.md.
"""

import argparse
import json
from pathlib import Path

from kvcast.protocol.config import ModelConfig, list_configs, load_config
from kvcast.protocol.log import LABEL
from kvcast.train.log import LogError, read_log, write_log
from kvcast.train.readers import READERS, TABLES, RawLog, Table, make_log
from kvcast.train.requests import Requests
from kvcast.train.splits import split_by_shares


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `log`."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a log, or with --from the data set's folder or file"
    )
    parser.add_argument("--config", required=True, help=f"{', '.join(list_configs())}, or the path of a TOML file")
    parser.add_argument("--from", dest="reader", choices=sorted({**READERS, **TABLES}), help="the data set")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the log to make: *.parquet or *.csv")
    parser.add_argument(
        "--bad-rows", choices=("stop", "skip"), default="stop", help="bad rows of the log (%(default)s)"
    )
    columns = parser.add_argument_group("columns, with --from csv and --from recbole")
    columns.add_argument(
        "--columns",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAMES",
        help="csv: user,item,-,action,time: all columns of a file without a header (-: not read); or "
        "user=visitorid,item=itemid,time=timestamp (default: the header's names)",
    )
    columns.add_argument("--label", default="", metavar="RULE", help="positive rows: 'action=buy,cart' or 'rating>=4'")
    columns.add_argument(
        "--separator", type=_read_separator, default=",", metavar="C", help=r"csv: between cells (%(default)s; tab: \t)"
    )
    columns.add_argument("--milliseconds", action="store_true", help="times are in milliseconds")
    parser.add_argument(
        "--pause",
        type=int,
        default=0,
        metavar="SECONDS",
        help="rows of a user are one request until nothing happens for so long (%(default)s: rows of one time)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check or make a log; return the exit status.

    Raises:
        KvcastError: the configuration, the data set or the log is not as documented.
    """
    config = load_config(arguments.config)
    if (arguments.reader is None) != (arguments.out is None):
        raise LogError("--from DATA-SET and --out FILE go together")
    path = arguments.source if arguments.reader is None else _make(arguments, config)
    _describe(path, config, arguments)
    return 0


def _make(arguments: argparse.Namespace, config: ModelConfig) -> Path:
    """Write the log and its vocabularies, and return the log's path."""
    path: Path = arguments.out
    if path.suffix not in (".parquet", ".csv"):  # before minutes of reading
        raise LogError(f"{path}: expected a file *.parquet or *.csv")
    made = make_log(_read(arguments), config.schema, arguments.pause, config.time_field)
    write_log(path, made.columns, config.schema)
    vocabularies = path.with_suffix(".vocabularies.json")
    document = {"vocabularies": made.vocabularies, "titles": made.titles}
    vocabularies.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    print("\n".join([*made.notes, f"{vocabularies}: which id is what"]))
    return path


def _read(arguments: argparse.Namespace) -> RawLog:
    table = Table(arguments.columns, arguments.label, arguments.separator, arguments.milliseconds)
    if arguments.reader in TABLES:
        return TABLES[arguments.reader](arguments.source, arguments.bad_rows, table)
    if table != Table():
        raise LogError(
            f"--columns, --label, --separator, --milliseconds: expected --from {' or '.join(sorted(TABLES))}"
        )
    return READERS[arguments.reader](arguments.source, arguments.bad_rows)


def _read_separator(text: str) -> str:
    separator = text.replace("\\t", "\t")
    if len(separator) != 1:
        raise argparse.ArgumentTypeError(f"expected one character, got {text!r}")
    return separator


def _describe(path: Path, config: ModelConfig, arguments: argparse.Namespace) -> None:
    log = read_log(path, config.schema, bad_rows=arguments.bad_rows)
    if log.bad.rows:
        print(f"{path}: {log.bad.rows} bad rows skipped:\n{log.bad.describe()}")
    if not len(log):
        raise LogError(f"{path}: expected at least one row, got none")
    requests = Requests(log, config.schema, config.limits, config.time_field)
    lengths, counts = requests.history_lengths, requests.candidate_counts
    print(
        f"{path}: {len(log)} rows of {len(log.users)} users, {log.label.mean():.1%} with {LABEL} 1; "
        f"{len(requests)} requests of {counts.mean():.1f} candidates after {lengths.mean():.1f} events (at most "
        f"{lengths.max()})"
    )
    print(split_by_shares(requests).describe())

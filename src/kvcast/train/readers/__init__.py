"""Readers: from local files, in their own format, into a log.

A reader turns files into a `RawLog`; `make_log` gives ids to what it found. Nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path

from kvcast.train.columns import OnBadRows
from kvcast.train.readers.kuairand import read_kuairand
from kvcast.train.readers.movielens import read_movielens
from kvcast.train.readers.table import Table, read_recbole, read_table
from kvcast.train.readers.vocabulary import MadeLog, RawLog, make_log

READERS: dict[str, Callable[[Path, OnBadRows], RawLog]] = {"movielens": read_movielens, "kuairand": read_kuairand}
# Those that have to be told what the columns are.
TABLES: dict[str, Callable[[Path, OnBadRows, Table], RawLog]] = {"csv": read_table, "recbole": read_recbole}

__all__ = [
    "READERS",
    "TABLES",
    "MadeLog",
    "RawLog",
    "Table",
    "make_log",
    "read_kuairand",
    "read_movielens",
    "read_recbole",
    "read_table",
]

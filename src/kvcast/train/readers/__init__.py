"""Readers of public data sets: from a local folder, in the files' own format, into a log.

A reader turns files into a `RawLog`; `make_log` gives ids to what it found. Nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path

from kvcast.train.columns import OnBadRows
from kvcast.train.readers.kuairand import read_kuairand
from kvcast.train.readers.movielens import read_movielens
from kvcast.train.readers.vocabulary import MadeLog, RawLog, make_log

READERS: dict[str, Callable[[Path, OnBadRows], RawLog]] = {"movielens": read_movielens, "kuairand": read_kuairand}

__all__ = ["READERS", "MadeLog", "RawLog", "make_log", "read_kuairand", "read_movielens"]

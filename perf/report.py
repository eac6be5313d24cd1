"""The Markdown report of a result file, by `report.md.j2`: measurements beside claims."""

from pathlib import Path
from typing import Any

import jinja2

from perf.plots import PEER_NAMES, SCHEME_NAMES, regime


def write_report(result: dict[str, Any]) -> str:
    """Return the report."""
    return str(_open_template().report(result, regime(result)))


def write_headline(result: dict[str, Any]) -> str:
    """Return README's table of shared against full recomputation."""
    return str(_open_template().headline(result["table"])).rstrip()


def write_reuse_headline(result: dict[str, Any]) -> str:
    """Return README's table of warm against cold."""
    return str(_open_template().reuse_headline(result["reuse"]["rows"])).rstrip()


def _open_template() -> Any:
    """Return the template's macros."""
    environment = jinja2.Environment(  # noqa: S701 Markdown, not HTML
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "unwrap": lambda text: " ".join(text.split()) + "\n",
        "spec": format,
        "duration": _say_duration,
        "milliseconds": _say_milliseconds,
        "percent": lambda value, digits=1: f"{100 * value:.{digits}f}%",
        "megabytes": lambda value: f"{value / 1e6:.0f} MB",
        "change": lambda before, after: f"{before / 1e6:.0f} → {after / 1e6:.0f} MB",
        "slope": lambda value: f"{value / 1e6:+.1f} MB",
        "name_peer": lambda name: PEER_NAMES.get(name, name),
        "times_of_peer": _say_times,
        "total": lambda counts: sum(counts.values()),
    }
    environment.globals |= {
        "header": _make_header,
        "cells": _make_row,
        "peer_names": PEER_NAMES,
        "scheme_names": SCHEME_NAMES,
    }
    return environment.get_template("report.md.j2").module


def _make_header(*names: str) -> str:
    """Return the first two lines of a table, numbers to the right."""
    return f"{_make_row(*names)}\n|{'|'.join(['---:'] * len(names))}|"


def _make_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _say_duration(seconds: float) -> str:
    return _say_milliseconds(seconds) if seconds < 0.9995 else f"{seconds:.2f} s"


def _say_milliseconds(seconds: float, digits: int = 1) -> str:
    return f"{1e3 * seconds:.{digits}f} ms"


def _say_times(peer: dict[str, Any]) -> str:
    """Return what a peer took, in milliseconds."""
    if "error" in peer:
        return "failed"
    return f"{1e3 * peer['total']:.1f} ({1e3 * peer['encode']:.1f} + {1e3 * peer['fuse']:.1f})"

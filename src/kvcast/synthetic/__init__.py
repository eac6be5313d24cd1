"""Synthetic click logs: seeded generators for the example request, tests and load tests, and of logs to train on.

They depend on the feature schema and numpy alone.
"""

from kvcast.synthetic.generator import ClickLog
from kvcast.synthetic.perf_input import write_perf_input
from kvcast.synthetic.shop import Shop
from kvcast.synthetic.trace import Trace, Traffic, Visit
from kvcast.synthetic.truth import Effects, Habits, PlantedLog, PlantedRows
from kvcast.synthetic.visitor import Visitor, draw_visitor

__all__ = [
    "ClickLog",
    "Effects",
    "Habits",
    "PlantedLog",
    "PlantedRows",
    "Shop",
    "Trace",
    "Traffic",
    "Visit",
    "Visitor",
    "draw_visitor",
    "write_perf_input",
]

"""Synthetic click logs: the seeded generators behind example request, tests and load tests, and of logs to train on.

It knows the feature schema and numpy; it knows nothing of models, servers or training.
"""

from kvcast.clicklog.generator import ClickLog
from kvcast.clicklog.shop import Shop
from kvcast.clicklog.trace import Trace, Traffic, Visit
from kvcast.clicklog.truth import Effects, Habits, PlantedLog, PlantedRows
from kvcast.clicklog.visitor import Visitor, draw_visitor

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
]

"""Synthetic click logs: the one seeded generator behind the example request, the tests and the load tests.

It knows the feature schema and numpy; it knows nothing of models, servers or training.
"""

from kvcast.clicklog.generator import ClickLog
from kvcast.clicklog.trace import Trace, Traffic, Visit

__all__ = ["ClickLog", "Trace", "Traffic", "Visit"]

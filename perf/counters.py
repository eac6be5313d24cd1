"""The counters of a running server, read from its metrics endpoint."""

import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families


class Counters:
    """One reading: `metric` of a model, summed over its instances and other labels."""

    def __init__(self, address: str) -> None:
        """Read the endpoint at `host:port` now."""
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        self._values: dict[tuple[str, str], float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._values[sample.labels.get("model", ""), sample.name] += sample.value

    def get(self, model: str, metric: str) -> float:
        """Return a value, 0 where nothing has been counted."""
        return self._values.get((model, metric), 0.0)

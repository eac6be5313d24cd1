"""The dashboard: its shape, and each of its queries, asked of a real prometheus that scrapes a real server."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcast.protocol.tensors import SCORE_TOLERANCE
from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.deploy.prometheus_process import SHIPPED, Prometheus, find_metrics, find_names, find_recorded, read_page
from tests.processes import wait_until

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "kvcast.json").read_text())
PANELS = DASHBOARD["panels"]
ROWS = [panel for panel in PANELS if panel["type"] == "row"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['id']}-{panel['title']}-{target['refId']}".replace(" ", "_"))
    for panel in GRAPHS
    for target in panel["targets"]
]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
# Ids of Grafana's units, of those that are used.
UNITS = {"none", "short", "s", "reqps", "ops", "bytes", "percentunit", "sci"}
# Grafana's own names: what a rate looks back, and the time that is shown.
INTERVALS = {"$__rate_interval": "1m", "$__range": "1h"}
ALL = "$__all"


def substitute(expression: str, values: dict[str, str]) -> str:
    """Put values in for variables, as Grafana does between the quotes of a Prometheus matcher."""
    for name, interval in INTERVALS.items():
        expression = expression.replace(name, interval)
    for name, value in values.items():
        text = VARIABLES[name]["allValue"] if value == ALL else escape(value)
        expression = re.sub(rf"\$\{{{name}\}}|\${name}\b", lambda _, text=text: text, expression)
    assert "$" not in expression, f"{expression}: a variable that the dashboard does not have"
    return expression


def escape(value: str) -> str:
    """Escape a value for a regular expression inside a string of PromQL."""
    return re.sub(r"([\\^$*+?.()|\[\]{}/])", r"\\\\\1", value)


def read_default(name: str) -> str:
    (value,) = VARIABLES[name]["current"]["value"]
    return value


def test_it_has_what_grafana_needs_to_import_it():
    assert DASHBOARD["id"] is None, "an id belongs to one Grafana"
    assert DASHBOARD["uid"] == "kvcast"
    assert DASHBOARD["schemaVersion"] >= 36, "data sources are objects from then on"
    assert {"title", "time", "refresh", "templating", "annotations"} <= DASHBOARD.keys()
    assert "__inputs" not in DASHBOARD, "the data source is a variable"


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert len(taken) == WIDTH * height, "there are holes"


def test_every_row_holds_panels_and_the_panels_come_in_reading_order():
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in PANELS]
    assert places == sorted(places)
    kinds = [panel["type"] for panel in PANELS]
    assert kinds[0] == "row"
    assert ("row", "row") not in itertools.pairwise(kinds)
    assert kinds[-1] != "row"


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"].replace(" ", "_"))
def test_a_panel_has_a_unit_a_source_and_a_remedy(panel):
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert len(panel["description"]) > 40
    assert panel["datasource"] == DATASOURCE
    assert panel["targets"]
    assert {target["refId"] for target in panel["targets"]} == set("ABCDEFGH"[: len(panel["targets"])])
    assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
    # Without a choice of servers the dashboard would mix those of several deployments.
    for target in panel["targets"]:
        for selector in re.findall(r"(?:kvcast|nv)_\w+(\{[^}]*\}|)", target["expr"]):
            assert 'job=~"$job"' in selector
            assert 'instance=~"$instance"' in selector


def test_variables_choose_everything_at_first():
    assert list(VARIABLES) == ["datasource", "job", "instance", "model"]
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for name in ("job", "instance", "model"):
        assert VARIABLES[name]["includeAll"]
        assert VARIABLES[name]["multi"]
        assert read_default(name) == ALL
        assert VARIABLES[name]["query"]["query"] == VARIABLES[name]["definition"]


def test_it_names_alerts_and_limits_that_exist():
    alerts = {rule["alert"]: rule for rule in iterate_alerts()}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\bKvcast[A-Z]\w+", text)) <= alerts.keys()
    (difference,) = [panel for panel in GRAPHS if "Largest difference" in panel["title"]]
    assert difference["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == SCORE_TOLERANCE


def iterate_alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((SHIPPED / "rules" / "alerts.yml").read_text())["groups"]:
        yield from group["rules"]


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory):
    """Prometheus on the session's server, which is asked for as long as the queries are."""
    requests = draw_requests()
    expected = {
        model: expect(requests, record_answers(server.grpc_address, requests, model))
        for model in ("ranker", "ranker_resident")
    }
    with (
        Prometheus(tmp_path_factory.mktemp("prometheus"), [server.metrics_address]) as running,
        Load(server.grpc_address, expected["ranker"], "ranker", threads=1, pause=0.05),
        Load(server.grpc_address, expected["ranker_resident"], "ranker_resident", threads=1, pause=0.05),
    ):
        wait_until(lambda: len(running.query("rate(kvcast_gateway_answered_total[10s]) > 0")) == 2, 20)
        for model in expected:  # new users, so that there is something to encode
            record_answers(server.grpc_address, draw_requests(seed=5000), model)
        wait_until(lambda: len(running.query("rate(kvcast_encode_seconds_count[10s]) > 0")) == 2, 20)
        yield running


def test_every_metric_of_the_dashboard_is_on_the_page(server, prometheus):
    # The first error of a code makes its series.
    names = find_names(read_page(server.metrics_address)) | {"kvcast_errors_total"}
    for query in QUERIES:
        (expression,) = query.values
        assert find_metrics(expression) <= names
        assert not find_recorded(expression), "it works without the rules"


@pytest.mark.parametrize("name", ["job", "instance", "model"])
def test_a_variable_has_values(server, prometheus, name):
    selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["definition"]).groups()
    values = prometheus.ask(
        f"label/{label}/values", **{"match[]": substitute(selector, dict.fromkeys(("job", "instance", "model"), ALL))}
    )
    assert {"job": "kvcast", "instance": server.metrics_address, "model": "ranker"}[name] in values


@pytest.mark.parametrize("choice", ["all", "one"])
@pytest.mark.parametrize("expression", QUERIES)
def test_a_query_returns_data(server, prometheus, expression, choice):
    values = dict.fromkeys(("job", "instance", "model"), ALL)
    if choice == "one":
        values = {"job": "kvcast", "instance": server.metrics_address, "model": "ranker_resident"}
    series = prometheus.query_range(substitute(expression, values), 3)
    numbers = [float(value) for each in series for _, value in each["values"]]
    assert any(map(math.isfinite, numbers)), f"{expression}: {series}"


def test_another_server_has_no_data(prometheus):
    """The variables are used: what is chosen is what is shown."""
    values = {"job": "kvcast", "instance": "127.0.0.1:1", "model": "ranker"}
    for query in QUERIES:
        (expression,) = query.values
        if "vector(0)" not in expression:
            assert prometheus.query(substitute(expression, values)) == []


def test_annotations_are_valid_queries(prometheus):
    for annotation in DASHBOARD["annotations"]["list"]:
        if annotation["datasource"] == DATASOURCE:
            prometheus.query(substitute(annotation["expr"], dict.fromkeys(("job", "instance", "model"), ALL)))

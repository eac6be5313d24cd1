"""The rules against promtool, and a real prometheus on a real server: healthy, under load, and with a dead process."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import yaml

from kvcast.client import NO_RETRIES
from kvcast.protocol.tensors import CANDIDATES, HISTORY, SCORE_TOLERANCE
from kvcast.server import ServeConfig, TritonServer
from kvcast.server.stubs import list_stubs
from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.deploy.prometheus_process import SHIPPED, Prometheus, find_metrics, find_names, find_recorded, read_page
from tests.deploy.tools import run_tool
from tests.processes import read_state, wait_until
from tests.support import find_free_ports

ROOT = Path(__file__).parents[2]
RULES = {
    name: [
        rule for group in yaml.safe_load((SHIPPED / "rules" / name).read_text())["groups"] for rule in group["rules"]
    ]
    for name in ("recording.yml", "alerts.yml")
}
ALERTS = {rule["alert"]: rule for rule in RULES["alerts.yml"]}
RECORDED = {rule["record"]: rule for rule in RULES["recording.yml"]}
RULE_TESTS = sorted((SHIPPED / "tests").glob("*.yml"))
# Seen by Prometheus itself.
OF_PROMETHEUS = {"up"}
# May begin to wait where the tests' machine is busy.
OF_SPEED = {"KvcastTailLatency", "KvcastWaitsLong"}


def run_promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    result = run_tool("promtool", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_the_configuration_and_the_rules_are_valid():
    output = run_promtool("check", "config", SHIPPED / "prometheus.yml")
    assert "WARNING" not in output.stdout + output.stderr
    run_promtool("check", "rules", *sorted((SHIPPED / "rules").glob("*.yml")))


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_rule_unit_tests_pass(path):
    run_promtool("test", "rules", path)


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not():
    cases = [
        case
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == ALERTS.keys()
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == ALERTS.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_urgent_it_is_what_is_wrong_and_what_to_do(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert {"summary", "description", "runbook", "runbook_url"} == rule["annotations"].keys()
    assert re.fullmatch(r"Check: .{20,} Action: .{20,}", rule["annotations"]["runbook"])
    assert rule["annotations"]["runbook_url"] == "docs/operations.md#alerts"


def test_a_wrong_score_is_what_export_calls_wrong():
    assert f"> {SCORE_TOLERANCE:.0e}".replace("e-05", "e-5") in ALERTS["KvcastScoresWrong"]["expr"]


def test_rules_ask_for_recorded_series_that_are_there():
    for rule in (*ALERTS.values(), *RECORDED.values()):
        assert find_recorded(rule["expr"]) <= RECORDED.keys()


def test_the_rules_use_the_labels_of_the_pod_monitor():
    monitor = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "pod-monitor.yaml").read_text())
    assert not any(each.get("honorLabels") for each in monitor["spec"]["podMetricsEndpoints"])
    assert "jobLabel" not in monitor["spec"]
    job = f"any-namespace/{monitor['metadata']['name']}"
    for alert in ("KvcastTargetDown", "KvcastNoServerReady"):
        (pattern,) = re.findall(r'up\{job=~"([^"]+)"\}', ALERTS[alert]["expr"])
        assert re.fullmatch(pattern, job)
        assert re.fullmatch(pattern, "kvcast")
        assert not re.fullmatch(pattern, f"{job}-proxy"), "a proxy is not a server"


@pytest.fixture(scope="module")
def watched(tiny_repository, tmp_path_factory):
    """A server of this module's own, all of whose rankings are shadowed, and which is hurt at the end."""
    repository = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("watched") / "repository"))
    http, grpc, metrics = find_free_ports(3)
    settings = ServeConfig(
        repository,
        ["ranker", "ranker_resident"],
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        shadow=1.0,
    )
    with TritonServer(settings) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(watched, tmp_path_factory):
    """Prometheus with the shipped rules on that server, which has answered and refused."""
    with Prometheus(tmp_path_factory.mktemp("prometheus"), [watched.metrics_address]) as running:
        wait_until(lambda: len(running.query_range("kvcast_ready")) == 1, 20)
        requests = draw_requests()
        for model in ("ranker", "ranker_resident"):
            answers = record_answers(watched.grpc_address, requests, model)
            with Load(watched.grpc_address, expect(requests, answers), model, threads=4, retry=NO_RETRIES) as load:
                load.wait_for(100)
            assert set(load.count()) == {"right"}
        ask_wrongly(watched)
        wait_until(lambda: all(running.query(name) for name in RECORDED), 20)
        yield running


def ask_wrongly(server: TritonServer) -> None:
    """Send a candidate that the model, not the gateway, refuses: one id beyond its vocabulary."""
    history = tritonclient.grpc.InferInput(HISTORY.name, [1, 0, 2], HISTORY.dtype)
    history.set_data_from_numpy(np.zeros((1, 0, 2), np.int64))
    candidates = tritonclient.grpc.InferInput(CANDIDATES.name, [1, 1, 4], CANDIDATES.dtype)
    candidates.set_data_from_numpy(np.full((1, 1, 4), 1 << 40))
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_address) as client,
        pytest.raises(tritonclient.grpc.InferenceServerException, match="expected"),
    ):
        client.infer("ranker_resident", [history, candidates])


def test_the_server_is_scraped(watched, prometheus):
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert target["health"] == "up", target["lastError"]
    assert target["labels"] == {"instance": watched.metrics_address, "job": "kvcast"}


def test_every_metric_of_the_rules_is_on_the_page(watched, prometheus):
    names = find_names(read_page(watched.metrics_address)) | OF_PROMETHEUS
    for rule in (*ALERTS.values(), *RECORDED.values()):
        assert find_metrics(rule["expr"]) <= names


def test_every_recorded_series_has_data_of_this_server(watched, prometheus):
    for name in RECORDED:
        series = prometheus.query(name)
        assert series, name
        for each in series:
            assert not {"exported_instance", "version"} & each["metric"].keys(), name
            if name.startswith("instance"):
                assert each["metric"]["instance"] == watched.metrics_address
            assert np.isfinite(float(each["value"][1])), each


def test_every_rule_is_evaluated_without_an_error_and_no_alert_fires_on_a_healthy_server(prometheus):
    rules = prometheus.list_rules()
    assert rules.keys() == {*ALERTS, *RECORDED}
    wait_until(lambda: all(rule["health"] == "ok" for rule in prometheus.list_rules().values()), 5)
    assert [rule["lastError"] for rule in rules.values() if rule.get("lastError")] == []
    states = {name: prometheus.find_states(name) for name in ALERTS}
    assert {name for name, found in states.items() if "firing" in found} == set()
    assert {name for name, found in states.items() if found} <= OF_SPEED


def test_a_dead_process_that_cannot_be_replaced_raises_alerts_until_it_can_be(watched, tmp_path):
    with Prometheus(tmp_path, [watched.metrics_address], patience="1s") as prometheus:
        wait_until(lambda: bool(prometheus.query("kvcast_ready == 1")), 20)
        graph = watched.settings.repository / "doc_fusion" / "1" / "model.onnx"
        whole = graph.read_bytes()
        graph.write_bytes(whole[:-100])
        os.kill(
            next(stub.pid for stub in list_stubs(watched.pid).values() if stub.model == "doc_fusion"), signal.SIGKILL
        )
        for alert in ("KvcastNotReady", "KvcastNoServerReady", "KvcastProcessDied"):
            wait_until(lambda alert=alert: prometheus.find_states(alert) == {"firing"}, 10)
        for alert in ("KvcastNotReady", "KvcastNoServerReady"):
            was_pending = f'ALERTS{{alertname="{alert}", alertstate="pending"}}'
            assert prometheus.query_range(was_pending, 60), "it fired without a wait"
        (died,) = prometheus.list_rules()["KvcastProcessDied"]["alerts"]
        assert died["labels"]["model"] == "doc_fusion"
        assert died["annotations"]["summary"] == f"A process of doc_fusion died on {watched.metrics_address}"
        graph.write_bytes(whole)
        wait_until(lambda: bool(read_state(watched)["is_ready"]), 30)
        wait_until(lambda: not prometheus.find_states("KvcastNotReady"), 10)
        assert prometheus.find_states("KvcastProcessDied") == {"firing"}, "it fires for a quarter of an hour"

"""Property 0: a graph that does not compute what its network computes is rejected, with the operator named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings

from kvcast.export.calls import OnnxCalls
from kvcast.export.cases import draw_case, list_large_cases, list_limit_cases, list_small_cases
from kvcast.export.equality import Comparison, Graphs, prove_graphs_equal_network
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.export.proofs import ProofError
from kvcast.export.template import write_graphs
from kvcast.export.trace import trace_model
from kvcast.networks.interface import RankingNetwork
from kvcast.networks.weights import draw_weights
from kvcast.protocol.tensors import DOC_FUSION, MAX_BATCH_SIZE, RANKER_FULL, RANKER_RESIDENT, USER_ENCODER
from tests.support import make_config, make_network
from tests.unit import differing
from tests.unit.differing import Plain

CONFIG = make_config(layers=1)


def trace(network: RankingNetwork, models: tuple[str, ...], folder: Path) -> Graphs:
    traced = {model: trace_model(network, model) for model in models}
    write_graphs([each.template for each in traced.values()], network, "00" * 32, folder)
    return Graphs({model: each.template for model, each in traced.items()}, folder, traced.__getitem__)


def build(family: type[Plain]) -> Plain:
    network = family(CONFIG).eval().requires_grad_(False)
    draw_weights(network, 0)
    return network


USER, ITEM = USER_ENCODER.name, DOC_FUSION.name
# Of each network: where it differs, on what kind of request, and at which operator.
DIFFERING = {
    differing.AddsExponentials: (ITEM, "times as large", "aten.logaddexp"),
    differing.TakesTheLogarithmOfASigmoid: (USER, "times as large", "aten.log_sigmoid"),
    differing.MeansByAction: (USER, "padding", "aten.scatter_reduce.two, exported as ScatterElements"),
    differing.TakesTheTopEvents: (USER, "events that differ in item alone", "aten.topk"),
    differing.SumsOverOlderEvents: (USER, "a user without events, one row", ""),
    differing.AsksForOlderEvents: (USER, "a user without events, one row", "aten.any"),
    differing.MasksWithInfinity: (USER, "a user without events, one row", "aten.scaled_dot_product_attention"),
    differing.MasksWithBooleans: (USER, "a user without events, one row", "aten.scaled_dot_product_attention"),
}


@pytest.mark.parametrize("family", DIFFERING, ids=lambda family: family.__name__)
@torch.inference_mode()
def test_an_operator_that_differs_is_refused_by_name(family, tmp_path):
    model, kind, operator = DIFFERING[family]
    network = build(family)
    with pytest.raises(ProofError) as caught:
        prove_graphs_equal_network(network, trace(network, (model,), tmp_path))
    message = str(caught.value)
    assert message.startswith(f"property 0, graphs = network: {model}, ")
    assert kind in message
    assert operator in message
    assert "keys of layer 1: expected" in message or "scores: expected" in message or "the call failed" in message


@pytest.mark.parametrize("model", [USER, ITEM, RANKER_RESIDENT.name, RANKER_FULL.name])
@torch.inference_mode()
def test_an_operator_that_was_replaced_in_a_file_is_refused_by_name(model, tmp_path):
    network = build(Plain)
    traced = trace(network, (model,), tmp_path)
    assert 0 <= prove_graphs_equal_network(network, traced) <= 1e-5
    right, wrong = ("Tanh", "Softsign") if model in (ITEM, RANKER_FULL.name) else ("Add", "Sub")
    change_file(traced.folder / model / "model.onnx", lambda node: replace_operator(node, right, wrong))
    with pytest.raises(ProofError) as caught:
        prove_graphs_equal_network(network, traced)
    assert f"{model}" in str(caught.value)
    assert f"exported as {wrong}" in str(caught.value)
    assert "difference of" in str(caught.value)


@torch.inference_mode()
def test_a_weight_that_was_changed_in_a_file_is_refused(tmp_path):
    network = build(Plain)
    traced = trace(network, (ITEM,), tmp_path)
    data = tmp_path / ITEM / "weights.data"
    weights = np.fromfile(data, np.float32)
    (weights * 1.0001).tofile(data)
    with pytest.raises(ProofError, match=r"doc_fusion, .*scores: expected what the network gives within 1e-05"):
        prove_graphs_equal_network(network, traced)


@torch.inference_mode()
def test_a_network_that_gives_nan_itself_is_refused(tmp_path):
    class DividesByNothing(Plain):
        def change_items(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens / tokens.abs().amax(dim=-1, keepdim=True)

    network = build(DividesByNothing)
    for table in network.tables.values():
        table.weight[-1] = 0
    with pytest.raises(ProofError, match=r"the last id of every vocabulary: scores: .* the network gives nan"):
        prove_graphs_equal_network(network, trace(network, (ITEM,), tmp_path))


@pytest.mark.parametrize("family", ["transformer", "hstu"])
@torch.inference_mode()
def test_the_families_that_come_with_the_project_equal_their_graphs_with_any_weights(family, tmp_path):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=family))
    traced = trace(make_network(config), (USER, ITEM), tmp_path)
    assert 0 <= prove_graphs_equal_network(make_network(config), traced) <= 1e-5
    for seed, scale in ((1, 1.5), (2, 0.01)):
        network = make_network(config, seed)
        for weight in network.parameters():
            weight.mul_(scale)
        graphs = OnnxCalls({model: graph.open(network) for model, graph in traced.templates.items()})
        assert max(Comparison(network, graphs).compare(case) for case in list_small_cases(config)) <= 1e-5


def test_a_refused_graph_leaves_the_repository_as_it_was(tmp_path):
    network = dataclasses.replace(CONFIG.network, family="tests.unit.differing:MasksWithBooleans")
    with pytest.raises(ProofError, match="property 0"):
        export_release(
            dataclasses.replace(CONFIG, network=network), WeightsSource(), tmp_path / "repository", say=lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


def test_the_kinds_of_request_are_all_there_and_within_the_limits():
    small, large = list(list_small_cases(CONFIG)), [*list_large_cases(CONFIG), *list_limit_cases(CONFIG)]
    for case in small + large:
        check_case(case)
    lengths = {case.history.shape[1] for case in large}
    assert {1, CONFIG.limits.history} <= lengths
    assert {1, CONFIG.limits.candidates} <= {case.candidates.shape[1] for case in large}
    assert max(len(case.history) for case in small) == MAX_BATCH_SIZE
    assert any((~case.history.any(axis=(1, 2))).any() and case.history.any() for case in small), "one without events"
    assert any(not case.history.size for case in small)
    for side in ("history", "candidates"):
        fields = CONFIG.schema.history_fields if side == "history" else CONFIG.schema.candidate_fields
        for column, field in enumerate(fields):
            ids = np.concatenate([getattr(case, side)[..., column].ravel() for case in small])
            assert {0, 1, field.vocab_size - 1} <= set(ids.tolist())


@settings(max_examples=50, deadline=None)
@given(draw_case(CONFIG))
def test_requests_that_are_searched_are_within_the_limits(case):
    check_case(case)


def check_case(case) -> None:
    assert len(case.history) == len(case.candidates) <= MAX_BATCH_SIZE
    for ids, fields, limit in (
        (case.history, CONFIG.schema.history_fields, CONFIG.limits.history),
        (case.candidates, CONFIG.schema.candidate_fields, CONFIG.limits.candidates),
    ):
        assert ids.dtype == np.int64
        assert ids.shape[1] <= limit
        assert ids.shape[2] == len(fields)
        assert (ids >= 0).all()
        assert (ids < [field.vocab_size for field in fields]).all()


def change_file(path: Path, change: Callable[[onnx.NodeProto], bool]) -> None:
    model = onnx.load(path, load_external_data=False)
    assert any(change(node) for node in model.graph.node)
    onnx.save(model, path)


def replace_operator(node: onnx.NodeProto, right: str, wrong: str) -> bool:
    if node.op_type != right:
        return False
    node.op_type = wrong
    return True

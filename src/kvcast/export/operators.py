"""Which operator is to blame where a graph and its network differ: both are run value by value.

The exporter names a graph's values after the steps of the traced program, so that most of them can be read from both
sides. Values inside the branches of an `If` cannot: there the choice itself is named. The module looks; it does not
judge whether a difference matters.
"""

import operator
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import fx
from torch.export.graph_signature import InputKind

from kvcast.export.graphs import TracedGraph
from kvcast.export.template import WEIGHTS_PREFIX, list_weights, open_session
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.golden import measure_differences
from kvcast.protocol.tensors import SCORE_TOLERANCE

Arrays = Mapping[str, npt.NDArray[Any]]
# Every value of a graph is held in memory: not for inputs with more ids than this.
MOST_IDS = 20_000


@torch.inference_mode()
def describe_first_difference(
    traced: TracedGraph, network: RankingNetwork, feeds: Arrays, file: Path | None
) -> str | None:
    """Say at which operator a graph leaves the network.

    Args:
        traced: the graph.
        network: whose weights it is run with.
        feeds: the graph's inputs by name.
        file: the exported file, to look into as well; its weights have to be the network's.

    Returns:
        A clause, or None if it cannot be told.
    """
    if sum(array.size for array in feeds.values() if array.dtype == np.int64) > MOST_IDS:
        return None
    expected = Recorder(traced.program.graph_module).record(_list_arguments(traced, network, feeds))
    steps = [step for step in traced.program.graph.nodes if step.name in expected]
    ways: list[Callable[..., tuple[ort.InferenceSession, dict[str, str]]]] = [partial(_open_unoptimised, network)]
    if file is not None:
        ways.append(partial(_open_file, file))
    for open_graph in ways:
        opened, operators = open_graph(traced, expected)
        got = dict(zip(operators, opened.run(list(operators), dict(feeds)), strict=True))
        for step in steps:
            if step.name in got and _differ(expected[step.name], got[step.name]):
                return f"the first operator that differs: {_describe_step(step)}, exported as {operators[step.name]}"
    return None


class Recorder(fx.Interpreter):
    """Runs a traced program in torch and keeps what each of its steps returns."""

    def record(self, arguments: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors by the names of the steps that made them."""
        self.made: dict[str, torch.Tensor] = {}
        self.run(*arguments)
        return self.made

    def run_node(self, n: fx.Node) -> Any:
        """Run one step."""
        made = super().run_node(n)
        if n.op == "call_function" and isinstance(made, torch.Tensor):
            self.made[n.name] = made
        return made


def _list_arguments(traced: TracedGraph, network: RankingNetwork, feeds: Arrays) -> list[torch.Tensor]:
    """Return what the traced program takes, in its order: weights, buffers, constants and the graph's inputs."""
    program, inputs = traced.program, iter(traced.graph.input_names)
    tensors = list_weights(network)
    arguments = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            arguments.append(torch.from_numpy(feeds[next(inputs)]))
        else:
            target = str(spec.target)
            known = (tensors, program.state_dict, program.constants)
            arguments.append(next(each[target] for each in known if target in each))
    return arguments


def _open_unoptimised(
    network: RankingNetwork, traced: TracedGraph, wanted: Collection[str]
) -> tuple[ort.InferenceSession, dict[str, str]]:
    """Open the graph before it was optimised; return also the operators that make those of the wanted values it has."""
    values = {value.name: node.op_type for node in traced.unoptimised.graph for value in node.outputs if value.name}
    operators = _select(values, traced, wanted)
    return traced.open_unoptimised(network, list(operators)), operators


def _open_file(path: Path, traced: TracedGraph, wanted: Collection[str]) -> tuple[ort.InferenceSession, dict[str, str]]:
    """Open the exported file in the same way; it has its own weights."""
    model = onnx.load(path, load_external_data=False)
    values = {name: node.op_type for node in model.graph.node for name in node.output}
    operators = _select(values, traced, wanted)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in operators)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:  # beside the file of weights
        file.write(model.SerializeToString())
        file.flush()
        return open_session(Path(file.name)), operators


def _select(values: Mapping[str, str], traced: TracedGraph, wanted: Collection[str]) -> dict[str, str]:
    return {name: op for name, op in values.items() if name in wanted and name not in traced.graph.output_names}


def _differ(expected: torch.Tensor, got: npt.NDArray[Any]) -> bool:
    array = expected.numpy()
    if array.shape != got.shape:
        return True
    if not np.issubdtype(array.dtype, np.floating):
        return not np.array_equal(array, got)
    is_equal = (measure_differences(array, got) <= SCORE_TOLERANCE) | (array == got)  # infinity equals itself
    return not bool(is_equal.all())


def _describe_step(step: fx.Node) -> str:
    """Return a step's operator in torch, and the part of the network that it belongs to, if it is in one."""
    if step.target is operator.getitem:  # one of several results
        step = cast("fx.Node", step.args[0])
    parts = [path for path, _ in (step.meta.get("nn_module_stack") or {}).values()]
    part = parts[-1].removeprefix(f"{WEIGHTS_PREFIX}.") if parts else ""
    return f"{step.target}{f' of {part}' if part else ''}"

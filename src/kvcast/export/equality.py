"""Property 0: every exported graph computes what the torch network computes.

The other properties judge the network by itself and the graphs by themselves, and hold in graphs that are wrong alike.
PyTorch's exporter and ONNX Runtime do differ from PyTorch on valid inputs, silently, and a network that a user brings
may contain any operator. So every graph is run beside the network: scores, and user KV layer by layer.

Weights decide whether an input reaches an operator's weak spot (an exponential overflows at 88). The graphs are
therefore also run with all weights scaled up, step by step, as long as the network itself stays finite. Such weights
can amplify rounding without bound: an output is held against the same tolerance where the network is well conditioned
(one rounding of every weight moves it by a small part of the tolerance), and must be finite everywhere.
"""

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.configuration import set_hypothesis_home_dir

from kvcast.export.calls import OnnxCalls, TorchCalls
from kvcast.export.cases import Case, draw_case, list_large_cases, list_limit_cases, list_small_cases
from kvcast.export.graphs import TracedGraph
from kvcast.export.operators import describe_first_difference
from kvcast.export.proofs import Calls, Floats, ProofError, make_no_user_kv
from kvcast.export.template import GraphTemplate, open_session
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.golden import measure_differences
from kvcast.protocol.manifest import ONNX_FILE
from kvcast.protocol.schema import KVLayout
from kvcast.protocol.tensors import DOC_FUSION, RANKER_FULL, RANKER_RESIDENT, SCORE_TOLERANCE, SCORES, USER_ENCODER

EQUAL = "property 0, graphs = network"
SEARCHED = 40  # requests that hypothesis draws
SCALES = (16, 512)
# Scaled weights are too large where the network's outputs exceed this: products of a few of them would overflow.
LARGEST = 1e10
# Well conditioned: one rounding of every weight moves an output by less than this part of the tolerance.
WELL_CONDITIONED = 1 / 16
MOST_WORDS = 400  # of another library's error
HINT = "docs/bring-your-own.md lists operators that differ from PyTorch's, and how to write them instead"

Outputs = dict[str, Floats]
Output = tuple[str, str]  # of which model, and its name
Call = Callable[[Calls], Outputs]
Result = TypeVar("Result")
P = ParamSpec("P")


class DifferenceError(Exception):
    """A graph and the network differ: on which request, in which output, by how much."""

    def __init__(self, model: str, case: Case, words: str) -> None:
        super().__init__(f"{EQUAL}: {model}, {case.kind}: {words}")
        self.model = model


class NotFiniteError(DifferenceError):
    """The network itself gives NaN or infinity."""


class CallError(DifferenceError):
    """The network or the graph raises an error of its own."""


@dataclass(frozen=True)
class Comparison:
    """A network and its graphs, with the same weights.

    only_finite: outputs that need only be finite, because rounding alone moves them by a part of the tolerance.
    largest: what the network's outputs may reach.
    """

    network: RankingNetwork
    graphs: OnnxCalls
    only_finite: frozenset[Output] = frozenset()
    largest: float = math.inf

    def compare(self, case: Case) -> float:
        """Run every graph beside the network; return the largest difference of all outputs.

        Raises:
            NotFiniteError: the network gives NaN, infinity, or numbers that are larger than `largest`.
            DifferenceError: an output of a graph differs by more than the tolerance or is not finite, or a call fails
                (which it may for a request that is not served).
        """
        largest = 0.0
        try:
            for model, call, expected in run_network(self.network, case, self.graphs.sessions, self.largest):
                got = _call(model, case, call, self.graphs)
                for name, values in expected.items():
                    largest = max(largest, self._compare_output((model, name), case, values, got[name]))
        except CallError:
            if case.is_served:
                raise
        return largest

    def _compare_output(self, output: Output, case: Case, expected: Floats, got: Floats) -> float:
        model, name = output
        if got.shape != expected.shape:
            raise DifferenceError(model, case, f"{name}: expected shape {list(expected.shape)}, got {list(got.shape)}")
        differences = measure_output(name, expected, got)
        largest = float(differences.max(initial=0))
        if math.isfinite(largest) and (largest <= SCORE_TOLERANCE or output in self.only_finite):
            return largest
        place = np.unravel_index(int(np.nan_to_num(differences, nan=np.inf).argmax()), differences.shape)
        raise DifferenceError(
            model,
            case,
            f"{name}: expected what the network gives within {SCORE_TOLERANCE:g} (relative above 1), got a difference "
            f"of {differences[place]:.3g}: {got[place]:.6g} instead of {expected[place]:.6g} at "
            f"{[int(index) for index in place]}",
        )


def run_network(
    network: RankingNetwork, case: Case, models: Collection[str], largest: float
) -> Iterator[tuple[str, Call, Outputs]]:
    """Run the network in the place of each graph of some models.

    Args:
        network: the network.
        case: the request.
        models: the models whose graphs are asked for.
        largest: what its outputs may reach.

    Returns:
        The model, and how it is called where there are two ways; the call; and what the network returns.

    Raises:
        NotFiniteError: the network itself gives NaN, infinity, or numbers that are larger.
        CallError: it raises an error.
    """
    calls = TorchCalls(network)
    user_kv = _call("the network", case, calls.encode_user, case.history)
    for model, call in _list_calls(case, user_kv, network.kv_layout):
        if model.partition(" ")[0] in models:
            outputs = _call(model, case, call, calls)
            for name, values in outputs.items():
                reached = np.abs(values).max(initial=0)
                if not (np.isfinite(reached) and reached <= largest):
                    raise NotFiniteError(model, case, f"{name}: expected finite numbers, the network gives {reached}")
            yield model, call, outputs


def measure_output(name: str, expected: Floats, got: Floats) -> npt.NDArray[np.float64]:
    """Return how far each element of an output is from the expected one, relative above 1.

    The elements of a slot's key or value are sums of the same terms and share their rounding: they are held against the
    largest of them, scores each against itself.
    """
    axis = {"keys": 2, "values": 3}.get(name.partition(" ")[0])
    size = np.abs(expected)
    if axis is not None and size.size:
        size = size.max(axis=axis, keepdims=True)
    return measure_differences(expected, got, size)


@dataclass(frozen=True)
class Graphs:
    """The graphs that are to be proved.

    templates: by model.
    folder: of the files, `<model>/model.onnx`.
    trace: traces the graph of a model, whose steps are looked at where it differs.
    """

    templates: Mapping[str, GraphTemplate]
    folder: Path
    trace: Callable[[str], TracedGraph]

    def open_files(self) -> OnnxCalls:
        """Open the exported files."""
        return OnnxCalls({model: open_session(self.folder / model / ONNX_FILE) for model in self.templates})


def prove_graphs_equal_network(network: RankingNetwork, graphs: Graphs, *, are_known: bool = False) -> float:
    """Prove property 0 on requests of every kind, with the weights that are exported and with larger ones.

    Args:
        network: the network whose graphs these are.
        graphs: the exported files are run; with larger weights, the templates that they came from.
        are_known: the templates were proved before, with other weights: larger weights, which ask about operators and
            not about these weights, are then tried on every third of the requests.

    Returns:
        The largest difference of scores and KV, relative above 1, with the weights that are exported.

    Raises:
        ProofError: a graph differs; the message names graph, kind of request, output and, where it can be told, the
            operator.
    """
    comparison = Comparison(network, graphs.open_files())
    with _refusing(comparison, graphs):
        with _one_thread():
            largest = max(comparison.compare(case) for case in list_small_cases(network.config))
            _search(comparison)
        largest = max(largest, *(comparison.compare(case) for case in list_large_cases(network.config)))
    with _one_thread():
        for scale in SCALES:
            if not _prove_scaled(scale, network, graphs, are_known=are_known):
                break
    return largest


def prove_graphs_equal_network_at_limits(network: RankingNetwork, graphs: Graphs) -> float:
    """Prove property 0 on requests at the limits; return the largest difference.

    Raises:
        ProofError: as `prove_graphs_equal_network`.
    """
    comparison = Comparison(network, graphs.open_files())
    with _refusing(comparison, graphs):
        return max(comparison.compare(case) for case in list_limit_cases(network.config))


def _prove_scaled(scale: float, network: RankingNetwork, graphs: Graphs, *, are_known: bool) -> bool:
    """Prove the same with larger weights; return False if they are too large for the network itself."""
    scaled = _change_weights(network, lambda weight: weight * scale)
    served = [case for case in list_small_cases(network.config) if case.is_served]
    some = served[::3]
    limit = SCORE_TOLERANCE * WELL_CONDITIONED
    try:
        rounding = _measure_rounding(scaled, some, graphs.templates)
        only_finite = frozenset(output for output, own in rounding.items() if own > limit)
        for model, template in graphs.templates.items():  # one after the other: each holds all weights
            comparison = Comparison(scaled, OnnxCalls({model: template.open(scaled)}), only_finite, LARGEST)
            with _refusing(comparison, graphs, f", with weights {scale} times as large"):
                for case in some if are_known else served:
                    comparison.compare(case)
    except NotFiniteError:
        return False
    return True


def _measure_rounding(network: RankingNetwork, cases: Sequence[Case], models: Collection[str]) -> dict[Output, float]:
    """Return how far one rounding of every weight moves each output of the network, at most."""
    rounded = TorchCalls(_change_weights(network, _round_otherwise))
    moved: dict[Output, float] = {}
    for case in cases:
        for model, call, outputs in run_network(network, case, models, LARGEST):
            others = call(rounded)
            for name, values in outputs.items():
                own = float(measure_output(name, values, others[name]).max(initial=0))
                moved[model, name] = max(moved.get((model, name), 0.0), own)
    return moved


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute small requests with one thread: several wait for each other, on busy cores most of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _search(comparison: Comparison) -> None:
    """Compare on requests that hypothesis draws, the same ones each time, and shrinks if there is a difference."""

    @settings(
        max_examples=SEARCHED,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(draw_case(comparison.network.config))
    def compare(case: Case) -> None:
        comparison.compare(case)

    with tempfile.TemporaryDirectory() as folder:  # and not .hypothesis in the folder that the export is called from
        set_hypothesis_home_dir(folder)
        try:
            compare()
        finally:
            set_hypothesis_home_dir(None)


def _list_calls(case: Case, user_kv: list[Floats], layout: KVLayout) -> Iterator[tuple[str, Call]]:
    """Return what each graph does with a request: the model, and how where there are two ways, and the call."""
    history, candidates = case.history, case.candidates

    def rank_cold(calls: Calls) -> Outputs:
        nothing = make_no_user_kv(layout, len(history))
        scores, made = calls.rank_resident(history, candidates, nothing, use_past=False)
        return _name_layers(made) | {SCORES.name: scores}

    def rank_warm(calls: Calls) -> Outputs:
        no_event = np.zeros((len(history), 1, history.shape[2]), np.int64)
        scores, _ = calls.rank_resident(no_event, candidates, user_kv, use_past=True)
        return {SCORES.name: scores}

    yield USER_ENCODER.name, lambda calls: _name_layers(calls.encode_user(history))
    yield DOC_FUSION.name, lambda calls: {SCORES.name: calls.fuse(user_kv, candidates)}
    yield f"{RANKER_RESIDENT.name} (cold)", rank_cold
    yield f"{RANKER_RESIDENT.name} (warm)", rank_warm
    if not case.is_long:
        yield RANKER_FULL.name, lambda calls: {SCORES.name: calls.run_monolith(history, candidates)}


def _call(model: str, case: Case, call: Callable[P, Result], *arguments: P.args, **options: P.kwargs) -> Result:
    try:
        return call(*arguments, **options)
    except Exception as error:  # a family's own mistakes have any type
        words = " ".join(str(error).split())
        raise CallError(model, case, f"the call failed: {type(error).__name__}: {words[:MOST_WORDS]}") from error


def _name_layers(user_kv: list[Floats]) -> Outputs:
    """Return M keys and M values with names, layer by layer."""
    layers = len(user_kv) // 2
    parts = [
        (f"{part} of layer {layer + 1}", layer + first)
        for layer in range(layers)
        for part, first in (("keys", 0), ("values", layers))
    ]
    return {name: user_kv[place] for name, place in parts}


def _change_weights(network: RankingNetwork, change: Callable[[torch.Tensor], torch.Tensor]) -> RankingNetwork:
    """Return a copy of the network with other weights."""
    changed = copy.deepcopy(network)
    for weight in changed.parameters():
        if weight.is_floating_point():
            weight.copy_(change(weight))
    return changed


def _round_otherwise(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight with each element one unit in the last place larger or smaller, by turns of a fixed lottery."""
    signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 2 - 1
    return weight * (1 + signs * torch.finfo(weight.dtype).eps)


@contextlib.contextmanager
def _refusing(comparison: Comparison, graphs: Graphs, weights: str = "") -> Iterator[None]:
    """Refuse an artefact whose graph differs, with the operator that is to blame.

    Raises:
        NotFiniteError: it is the network that is not finite, because its weights were changed.
        ProofError: anything else.
    """
    try:
        yield
    except (CallError, NotFiniteError) as error:
        if weights and isinstance(error, NotFiniteError):
            raise
        raise ProofError(f"{error}{weights}") from error
    except DifferenceError as error:
        operator = _find_operator(comparison, graphs, error.model.partition(" ")[0], look_at_file=not weights)
        raise ProofError(f"{error}{weights}{operator}\n  {HINT}") from error


def _find_operator(comparison: Comparison, graphs: Graphs, model: str, *, look_at_file: bool) -> str:
    """Return a line that names the operator where a graph leaves the network, or nothing."""
    feeds = comparison.graphs.feeds[model]
    file = graphs.folder / model / ONNX_FILE if look_at_file else None
    try:
        found = describe_first_difference(graphs.trace(model), comparison.network, feeds, file)
    except Exception:  # noqa: BLE001 whatever fails here, the difference is what has to be said
        found = None
    return f"\n  {found}" if found else ""

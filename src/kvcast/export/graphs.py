"""The four ONNX graphs of a network, traced by `torch.onnx.export`.

`user_encoder` takes histories and returns stacked KV. `doc_fusion` takes one KV tensor a layer: a layer
of a stacked array is a view, while a slice inside a graph is a copy. `ranker_resident` does both sides in one graph, KV
layer by layer on both ends. `ranker_full` is the monolith. What is traced becomes a template, into which any weights
can be put (export/template.py). The module traces; it proves and writes nothing.
"""

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime as ort
import onnxscript
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from kvcast.export.release import hash_steps, list_tensors_read
from kvcast.export.template import GraphTemplate, detach_weights, list_weights, open_session, split_folding
from kvcast.networks.attention import ATTEND_UNMASKED
from kvcast.networks.interface import RankingNetwork, UserKV
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.tensors import (
    CANDIDATES,
    DOC_FUSION,
    HISTORY,
    RANKER_FULL,
    RANKER_RESIDENT,
    SCORES,
    USE_PAST,
    USER_ENCODER,
    USER_KEYS,
    USER_VALUES,
    layer_tensor_name,
    past_tensor_name,
)

OPSET = 20
# The part of ONNX Runtime's operator that is used here; onnx itself has no schema of it.
MULTI_HEAD_ATTENTION = onnx.defs.OpSchema(
    "MultiHeadAttention",
    "com.microsoft",
    1,
    inputs=[onnx.defs.OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
    outputs=[onnx.defs.OpSchema.FormalParameter("output", "T")],
    type_constraints=[("T", ["tensor(float)"], "fp32, as it is exported")],
    attributes=[onnx.defs.OpSchema.Attribute("num_heads", onnx.defs.OpSchema.AttrType.INT, required=True)],
)


class FullGraph(nn.Module):
    """history, candidates → scores, by full recomputation."""

    def __init__(self, network: RankingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """INT64 `[B, L, fields]`, `[B, N, T]` → FP32 `[B, N]`."""
        scores, _ = self.network.run_monolith(history, candidates, "target_blind")
        return scores


class EncoderGraph(nn.Module):
    """history → user_keys, user_values."""

    def __init__(self, network: RankingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """INT64 `[B, L, fields]` → `[B, M, H, key_rows, slots]`, `[B, M, H, slots, value_columns]`."""
        user_kv = self.network.encode_user(history)
        return torch.stack(user_kv.keys, dim=1), torch.stack(user_kv.values, dim=1)


class FusionGraph(nn.Module):
    """candidates and one KV tensor a layer → scores."""

    def __init__(self, network: RankingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, candidates: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        """INT64 `[B, N, T]` and M times `[B, H, …]` each → FP32 `[B, N]`."""
        return self.network.fuse(UserKV(keys, values), candidates)


class ResidentGraph(nn.Module):
    """history, candidates, past KV, which of the two to use → scores and, layer by layer, the KV of the history."""

    def __init__(self, network: RankingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        history: Tensor,
        candidates: Tensor,
        use_past: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `RankingNetwork.rank`."""
        scores, user_kv = self.network.rank(history, candidates, UserKV(keys, values), use_past)
        return scores, user_kv.keys, user_kv.values


@dataclass(frozen=True)
class Graph:
    """What the exporter needs to trace one model: the module, sample inputs and the names on both sides."""

    model: str
    module: nn.Module
    sample: tuple[object, ...]
    dynamic_shapes: tuple[object, ...]
    input_names: list[str]
    output_names: list[str]


@dataclass(frozen=True)
class TracedGraph:
    """What a trace gave: the template, the program that it was made from, and the same in ONNX, not optimised.

    The last has the name of every step of the program, and every weight by its name in `graph.module`.
    """

    graph: Graph
    template: GraphTemplate
    program: torch.export.ExportedProgram
    unoptimised: onnx_ir.Model

    def open_unoptimised(self, network: RankingNetwork, more_outputs: Sequence[str]) -> ort.InferenceSession:
        """Open the graph as it was before it was optimised.

        Args:
            network: of the same configuration; the session runs with its weights, where they lie.
            more_outputs: names of values in the graph that become outputs too.
        """
        model = self.unoptimised.clone()
        weights = {
            name: tensor.contiguous().numpy()
            for name, tensor in list_weights(network).items()
            if name in model.graph.initializers
        }
        for name, array in weights.items():
            model.graph.initializers[name].const_value = _describe_weight(name, array)
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(values[name] for name in more_outputs)
        return open_session(onnx_ir.to_proto(model).SerializeToString(), weights)


def _describe_weight(name: str, array: npt.NDArray[Any]) -> onnx_ir.ExternalTensor:
    """Return a tensor for a graph whose bytes the session is given when it is opened: no file is read."""
    data_type = onnx_ir.DataType.from_numpy(array.dtype)
    return onnx_ir.ExternalTensor("weights", 0, array.nbytes, data_type, shape=onnx_ir.Shape(array.shape), name=name)


def describe_graphs(network: RankingNetwork) -> list[Graph]:
    """Return the graphs of a network."""
    schema, layers = network.config.schema, network.kv_layout.layers
    # Every dynamic size is at least 2 here, or tracing would take a 1 for a constant.
    history = torch.ones(2, 5, len(schema.history_fields), dtype=torch.int64)
    candidates = torch.ones(2, 3, len(schema.candidate_fields), dtype=torch.int64)
    user_kv = network.encode_user(history)
    longer = network.encode_user(torch.ones(2, 7, len(schema.history_fields), dtype=torch.int64))
    layer_names = [layer_tensor_name(spec, m) for spec in (USER_KEYS, USER_VALUES) for m in range(layers)]
    past_names = [past_tensor_name(spec, m) for spec in (USER_KEYS, USER_VALUES) for m in range(layers)]
    return [
        Graph(
            USER_ENCODER.name,
            EncoderGraph(network),
            (history,),
            ({0: "users", 1: "L"},),
            [HISTORY.name],
            [USER_KEYS.name, USER_VALUES.name],
        ),
        Graph(
            DOC_FUSION.name,
            FusionGraph(network),
            (candidates, user_kv.keys, user_kv.values),
            (
                {0: "users", 1: "N"},
                ({0: "users", 3: "slots"},) * layers,
                ({0: "users", 2: "slots"},) * layers,
            ),
            [CANDIDATES.name, *layer_names],
            [SCORES.name],
        ),
        Graph(
            RANKER_RESIDENT.name,
            ResidentGraph(network),
            (history, candidates, torch.tensor(False), longer.keys, longer.values),
            (
                {0: "users", 1: "L"},
                {0: "users", 1: "N"},
                None,
                ({0: "users", 3: "past_slots"},) * layers,
                ({0: "users", 2: "past_slots"},) * layers,
            ),
            [HISTORY.name, CANDIDATES.name, USE_PAST, *past_names],
            [SCORES.name, *layer_names],
        ),
        Graph(
            RANKER_FULL.name,
            FullGraph(network),
            (history, candidates),
            ({0: "users", 1: "L"}, {0: "users", 1: "N"}),
            [HISTORY.name, CANDIDATES.name],
            [SCORES.name],
        ),
    ]


class TraceError(ArtefactError):
    """A network's code cannot be made into a graph."""


def trace_graph(graph: Graph, network: RankingNetwork) -> TracedGraph:
    """Trace one graph of a network.

    Raises:
        TraceError: the network's code cannot be traced for any number of users, events and candidates.
    """
    weights = list_weights(network)
    with _quiet_exporter(), _explaining(graph):
        program = torch.onnx.export(
            graph.module,
            graph.sample,
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_shapes=graph.dynamic_shapes,
            custom_translation_table={ATTEND_UNMASKED: translate_attend_unmasked},
            optimize=False,
            verbose=False,
        )
        if program is None or program.exported_program is None:
            raise RuntimeError(f"{graph.model}: the ONNX exporter returned nothing")
        unoptimised = program.model.clone()
        detach_weights(program.model, weights)
        program.optimize()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of the exporting machine
    structure, folding, direct = split_folding(onnx_ir.to_proto(program.model), weights)
    traced = program.exported_program
    template = GraphTemplate(
        model=graph.model,
        structure=structure.SerializeToString(deterministic=True),
        folding=folding.SerializeToString(deterministic=True),
        direct=tuple(direct),
        folded=tuple(each.name for each in folding.graph.output),
        steps=hash_steps(traced),
        reads=tuple(sorted(list_tensors_read(traced).keys() & weights.keys())),
    )
    return TracedGraph(graph, template, traced, unoptimised)


def translate_attend_unmasked(query: Any, key: Any, value: Any, heads: int) -> Any:
    """Spell `network.attention.attend_unmasked` as ONNX Runtime's operator, on its CPU and CUDA providers alike."""
    schema = MULTI_HEAD_ATTENTION
    operator = onnxscript.values.Op(onnxscript.values.Opset(schema.domain, schema.since_version), schema.name, schema)
    return operator(query, key, value, num_heads=heads)


@contextlib.contextmanager
def _explaining(graph: Graph) -> Iterator[None]:
    """Say of a failed trace what went wrong, and in which line of the network's, in a few lines."""
    try:
        yield
    except Exception as error:  # a family's own mistakes have any type
        chain = _list_causes(error)
        words = " ".join(line.strip() for line in str(chain[-1]).strip().splitlines()[:2])
        if step := _find_untranslated(chain):
            raise TraceError(
                f"{graph.model}: the operator {step.target} cannot be translated to ONNX: {type(chain[-1]).__name__}: "
                f"{words}{_say_where(_find_call(graph, step))}\n"
                "  It has to be written with operators that can (docs/bring-your-own.md)"
            ) from error
        frames = [frame for each in chain for frame in traceback.extract_tb(each.__traceback__) if _is_own(frame)]
        raise TraceError(
            f"{graph.model} cannot be traced for any number of users, events and candidates: "
            f"{type(chain[-1]).__name__}: {words}{_say_where(frames)}\n"
            "  Sizes come from the tensors that are given, and no Python loop runs over them (over events: nn.GRU or "
            "nn.LSTM, no cell); a choice by content is torch.where or branch.choose; a constant tensor is a registered "
            "buffer; a weight is transposed by .transpose(0, 1), not by .T (docs/bring-your-own.md)"
        ) from error


def _find_untranslated(chain: Sequence[BaseException]) -> fx.Node | None:
    """Return the step that the exporter was translating when it failed, if it was so far."""
    translating = [error for error in chain if isinstance(error, torch.onnx.OnnxExporterError)]
    frames = [frame for error in translating for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get("node") for frame in frames]
    return next((node for node in found if isinstance(node, fx.Node)), None)


class _Watch(TorchFunctionMode):
    """Keeps the lines from which a function of torch is called, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.calls: list[list[traceback.FrameSummary]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        if getattr(func, "__name__", "") == self._name:
            self.calls.append([frame for frame in traceback.extract_stack() if _is_own(frame)])
        return func(*args, **(kwargs or {}))


def _find_call(graph: Graph, step: fx.Node) -> list[traceback.FrameSummary]:
    """Return the network's lines that call for a step of a trace: PyTorch keeps none outside `forward`."""
    counted, name = step.meta.get("torch_fn", ("", ""))  # such as sort_2, the second call, and method_descriptor.sort
    watch = _Watch(name.rpartition(".")[2])
    with contextlib.suppress(Exception), watch:  # the operator is said in any case
        graph.module(*graph.sample)
    place = int(counted.rpartition("_")[2] or 1) - 1
    return watch.calls[place] if place < len(watch.calls) else []


def _say_where(frames: Sequence[traceback.FrameSummary]) -> str:
    return f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _list_causes(error: BaseException) -> list[BaseException]:
    """Return an error, what it was raised for, and so on."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a line is a network's: no library's, and none of this room's."""
    path = Path(frame.filename)
    is_library = "site-packages" in path.parts or path.is_relative_to(Path(contextlib.__file__).parent)
    return path.is_absolute() and not is_library and path.resolve().parent != Path(__file__).resolve().parent


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hold back what the exporter prints of its own steps, and of a graph that fails; its errors are exceptions."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

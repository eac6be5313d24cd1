"""A traced graph without weights: with those of a network put in, it is the ONNX file that serves them.

The exporter's optimiser folds what is computed of weights alone, every transposed matrix for example, into constants
without a name: other weights would need another trace. Here those computations are a graph of their own, `folding`,
which is run for each set of weights. So a template holds no number that depends on a weight, and the files of a first
export and of a later one are made in the same way. All graphs of an export share one file of weights.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime as ort
import torch

from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.manifest import ONNX_FILE, RELEASE_METADATA_KEY, WEIGHTS_FILE, link_or_copy

# Before the network's own names of its weights, in each of the traced modules.
WEIGHTS_PREFIX = "network"
ALIGNMENT = 64  # bytes, of each weight in the file: a cache line, and the widest vector register

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class GraphTemplate:
    """A graph as ONNX, without weights.

    model: whose graph it is.
    structure: the serialised graph, which lacks the initializers `direct` and `folded`.
    folding: a serialised graph from weights of the network, by their names, to those of `folded`; empty if none are.
    direct: weights that the graph reads as the network has them.
    folded: weights that are computed of others.
    steps: SHA-256 (hex) of the traced steps and constants.
    reads: the weights and buffers that the trace uses.
    """

    model: str
    structure: bytes
    folding: bytes
    direct: tuple[str, ...]
    folded: tuple[str, ...]
    steps: str
    reads: tuple[str, ...]

    def compute_weights(self, network: RankingNetwork) -> Arrays:
        """Return the graph's weights by name; those that are read directly lie where the network has them."""
        own = {name: tensor.detach().contiguous().numpy() for name, tensor in list_weights(network).items()}
        weights = {name: own[name] for name in self.direct}
        if self.folded:
            session = open_session(self.folding)
            feeds = {each.name: own[each.name] for each in session.get_inputs()}
            weights |= zip(self.folded, session.run(list(self.folded), feeds), strict=True)
        return weights

    def open(self, network: RankingNetwork) -> ort.InferenceSession:
        """Open the graph with the weights of a network of the same configuration."""
        weights = self.compute_weights(network)
        places = {name: (0, array.nbytes) for name, array in weights.items()}
        return open_session(_place_weights(self.structure, weights, places).SerializeToString(), weights)


def list_weights(network: RankingNetwork) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by the names that they have in a trace; a tied one has several."""
    return {
        **dict(network.named_parameters(WEIGHTS_PREFIX, remove_duplicate=False)),
        **dict(network.named_buffers(WEIGHTS_PREFIX, remove_duplicate=False)),
    }


def detach_weights(model: onnx_ir.Model, weights: Collection[str]) -> None:
    """Make inputs of these initializers, so that no optimiser looks at their values."""
    for name in [name for name in model.graph.initializers if name in weights]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


def split_folding(
    model: onnx.ModelProto, weights: Collection[str]
) -> tuple[onnx.ModelProto, onnx.ModelProto, list[str]]:
    """Split what is computed of weights alone from a graph, of which weights are inputs.

    Returns:
        The graph without those steps and without weights among its inputs; the graph of those steps, whose outputs are
        what the first one lacks; and the names of the weights that the first reads directly.
    """
    steps: list[onnx.NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    known = set(weights)  # values of weights alone
    # Branches beside each other may use one name for different values: those are left alone.
    times = Counter(_list_names_made(model.graph))

    def move_steps(graph: onnx.GraphProto) -> None:
        constants.update({each.name: each for each in graph.initializer if times[each.name] == 1})
        outputs = {each.name for each in graph.output}  # which a graph has to make itself
        kept = []
        for node in _copy(graph.node):
            inputs = {name for name in node.input if name}
            is_known = bool(inputs & known) and inputs <= known | constants.keys() and not _list_subgraphs(node)
            if is_known and not outputs & set(node.output) and all(times[name] == 1 for name in node.output):
                steps.append(node)
                known.update(node.output)
            else:
                kept.append(node)
        del graph.node[:]
        graph.node.extend(kept)
        for node in graph.node:
            for subgraph in _list_subgraphs(node):
                move_steps(subgraph)

    structure = onnx.ModelProto()
    structure.CopyFrom(model)
    move_steps(structure.graph)
    needed = _list_names_read(structure.graph) & known
    folded = [name for step in steps for name in step.output if name in needed]
    read = {name for step in steps for name in step.input}
    folding = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    folding.graph.name = "folding"
    folding.graph.node.extend(steps)
    folding.graph.initializer.extend(constants[name] for name in sorted(read & constants.keys()))
    folding.graph.input.extend(each for each in model.graph.input if each.name in read and each.name in weights)
    folding.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in folded)
    _keep(structure.graph.input, lambda each: each.name not in weights)
    read = _list_names_read(structure.graph)
    _keep(structure.graph.initializer, lambda each: each.name in read)
    return structure, folding, sorted(needed & set(weights))


def write_graphs(templates: Iterable[GraphTemplate], network: RankingNetwork, release: str, folder: Path) -> None:
    """Write `folder/<model>/model.onnx` with a network's weights, and the weights, which all graphs share, beside each.

    The release is written into each file's metadata, so that a file that was swapped is noticed at load. The files of
    weights are hard links to one file where the file system has them, and copies elsewhere.
    """
    shared = folder / WEIGHTS_FILE
    with shared.open("wb") as file:
        writer = WeightsWriter(file)
        for template in templates:
            weights = template.compute_weights(network)
            places = {name: writer.add(array) for name, array in weights.items()}
            model = _place_weights(template.structure, weights, places)
            model.metadata_props.append(onnx.StringStringEntryProto(key=RELEASE_METADATA_KEY, value=release))
            (folder / template.model).mkdir()
            (folder / template.model / ONNX_FILE).write_bytes(model.SerializeToString())
    for template in templates:
        link_or_copy(shared, folder / template.model / WEIGHTS_FILE)
    shared.unlink()


class WeightsWriter:
    """Writes arrays into an open file, equal ones once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, tuple[int, int]] = {}

    def add(self, array: npt.NDArray[Any]) -> tuple[int, int]:
        """Write an array, unless its bytes are there; return their offset and number."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._places[digest] = self._file.tell(), content.nbytes
            self._file.write(content)
        return self._places[digest]


def open_session(model: Path | bytes, weights: Mapping[str, npt.NDArray[Any]] | None = None) -> ort.InferenceSession:
    """Open a graph for the proofs, on the CPU; what fails is an exception and not a line of ONNX Runtime's as well.

    Args:
        model: the file, or the serialised graph.
        weights: initializers that the graph says are outside; used where they lie.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Sessions take turns with torch on the same cores: threads that wait busily slow everything else down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C")) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _place_weights(structure: bytes, weights: Arrays, places: Mapping[str, tuple[int, int]]) -> onnx.ModelProto:
    """Return the graph with its weights as initializers at (offset, bytes) of the shared file."""
    model = onnx.load_model_from_string(structure)
    for name, array in weights.items():
        offset, length = places[name]
        tensor = model.graph.initializer.add(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    return model


def _list_subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for each in node.attribute for graph in ((each.g,) if each.HasField("g") else each.graphs)]


def _list_names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values that nodes read, in subgraphs too, and that a graph gives."""
    names = {each.name for each in graph.output}
    for node in graph.node:
        names.update(node.input)
        for subgraph in _list_subgraphs(node):
            names |= _list_names_read(subgraph)
    return names


def _list_names_made(graph: onnx.GraphProto) -> list[str]:
    """Return the names of values that a graph and its subgraphs define, each as often as it is defined."""
    names = [each.name for each in (*graph.input, *graph.initializer)]
    for node in graph.node:
        names += node.output
        for subgraph in _list_subgraphs(node):
            names += _list_names_made(subgraph)
    return names


def _copy(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
    return copies


def _keep(entries: Any, is_kept: Callable[[Any], bool]) -> None:
    """Remove entries of a repeated field."""
    for index in reversed(range(len(entries))):
        if not is_kept(entries[index]):
            del entries[index]

"""The peer that ONNX Runtime's operators suggest: MultiHeadAttention with `past_key`/`past_value`, N copies of both.

The contrib op broadcasts nothing over the batch, so the user's KV is expanded over the candidates inside the graph. The
graphs are written by hand from the same weights (`softmax` says of which networks); they know nothing of kvcast's KV
layout.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from perf.baselines.interface import Floats, Ids, Peer
from perf.baselines.softmax import SoftmaxNetwork


class GraphWriter:
    """Collects nodes and weights of one ONNX graph."""

    def __init__(self, weights: dict[str, Floats], heads: int) -> None:
        self.weights, self.heads = weights, heads
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, array: Any) -> str:
        """Add an initializer once; return its name."""
        self.initializers.setdefault(name, numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node; return the names of its outputs."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names

    def linear(self, part: str, value: str) -> str:
        """`value · Wᵀ + b` of one linear layer."""
        weight = self.constant(f"{part}.weight.T", self.weights[f"{part}.weight"].T)
        (product,) = self.add("MatMul", [value, weight])
        return self.add("Add", [product, self.constant(f"{part}.bias", self.weights[f"{part}.bias"])])[0]

    def norm(self, part: str, value: str) -> str:
        """Layer normalisation."""
        names = [self.constant(f"{part}.{kind}", self.weights[f"{part}.{kind}"]) for kind in ("weight", "bias")]
        return self.add("LayerNormalization", [value, *names], axis=-1, epsilon=1e-5)[0]

    def embed(self, ids: str, tables: list[str], axis: int) -> list[str]:
        """Look up each column of `ids` along its last axis in its table."""
        looked_up = []
        for column, table in enumerate(tables):
            (index,) = self.add("Gather", [ids, self.constant(f"column_{column}", np.int64(column))], axis=axis)
            looked_up += self.add("Gather", [self.constant(table, self.weights[table]), index], axis=0)
        return looked_up

    def attend(self, query: str, key: str, value: str, past: list[str], presents: int) -> list[str]:
        """The contrib op: `[B, S, d]` each, past `[B, H, L, dh]`."""
        inputs = [query, key, value, "", "", "", *past]
        return self.add("MultiHeadAttention", inputs, 1 + presents, domain="com.microsoft", num_heads=self.heads)

    def close(self, block: str, tokens: str, attended: str) -> str:
        """Residual, feed-forward, residual."""
        (tokens,) = self.add("Add", [tokens, self.linear(f"{block}.output", attended)])
        hidden = self.linear(f"{block}.expand", self.norm(f"{block}.feed_forward_norm", tokens))
        (hidden,) = self.add("Gelu", [hidden])
        return self.add("Add", [tokens, self.linear(f"{block}.contract", hidden)])[0]

    def open_session(self, inputs: list[Any], outputs: list[str], threads: int) -> ort.InferenceSession:
        """Return a session on what was written."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "peer", inputs, values, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OrtExpanded(Peer):
    """ONNX Runtime, MultiHeadAttention, past KV expanded N times."""

    def __init__(self, network: SoftmaxNetwork, threads: int) -> None:
        self._weights = {name: value.numpy() for name, value in network.state_dict().items()}
        self._config, self._threads = network.config, threads
        self._layers = range(network.config.network.layers)
        self._encoder = self._write_encoder()
        self._fusion = self._write_fusion()

    def encode(self, history: Ids) -> list[Floats]:
        """Return keys and values of each layer, `[1, H, L, dh]`, in turn."""
        return list(self._encoder.run(None, {"history": history[None]}))

    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """Score, expanding the KV inside the graph."""
        feeds = dict(zip(self._past_names(), user_kv, strict=True))
        (scores,) = self._fusion.run(None, {"candidates": candidates, **feeds})
        return np.asarray(scores).reshape(-1)

    def _past_names(self) -> list[str]:
        return [f"{kind}_{layer}" for layer in self._layers for kind in ("key", "value")]

    def _write_encoder(self) -> ort.InferenceSession:
        write = GraphWriter(self._weights, self._config.network.heads)
        tables = [f"embeddings.{field.name}.weight" for field in self._config.schema.history_fields]
        first, *others = write.embed("history", tables, axis=2)
        for other in others:
            (first,) = write.add("Add", [first, other])
        (shape,) = write.add("Shape", ["history"], start=1, end=2)
        starts, axes = write.constant("zero", np.zeros(1, np.int64)), write.constant("axis", np.zeros(1, np.int64))
        positions = write.constant("positions.weight", self._weights["positions.weight"])
        (tokens,) = write.add("Add", [first, write.add("Slice", [positions, starts, shape, axes])[0]])
        outputs = []
        for layer in self._layers:
            block = f"blocks.{layer}"
            normed = write.norm(f"{block}.attention_norm", tokens)
            key, value = (write.linear(f"{block}.{part}", normed) for part in ("key", "value"))
            outputs += [self._split_heads(write, key), self._split_heads(write, value)]
            if layer < self._layers[-1]:  # the last layer is trimmed to keys and values
                query = write.linear(f"{block}.query", normed)
                (attended,) = write.attend(query, key, value, [], 0)
                tokens = write.close(block, tokens, attended)
        ids = helper.make_tensor_value_info("history", TensorProto.INT64, [1, "L", len(tables)])
        return write.open_session([ids], outputs, self._threads)

    def _split_heads(self, write: GraphWriter, value: str) -> str:
        """`[1, L, d]` → `[1, H, L, dh]`."""
        shape = write.constant("heads_shape", np.array([0, 0, self._config.network.heads, -1]))
        (split,) = write.add("Reshape", [value, shape])
        return write.add("Transpose", [split], perm=[0, 2, 1, 3])[0]

    def _write_fusion(self) -> ort.InferenceSession:
        network = self._config.network
        write = GraphWriter(self._weights, network.heads)
        tables = [f"embeddings.{field.name}.weight" for field in self._config.schema.candidate_fields]
        axis = write.constant("token_axis", np.array([1]))
        columns = [write.add("Unsqueeze", [value, axis])[0] for value in write.embed("candidates", tables, axis=1)]
        (tokens,) = write.add("Concat", columns, axis=1)  # [N, T, d]
        (tokens,) = write.add("Add", [tokens, write.constant("types.weight", self._weights["types.weight"])])
        (count,) = write.add("Shape", ["candidates"], start=0, end=1)
        rest = write.constant("rest", np.ones(3, np.int64))
        (copies,) = write.add("Concat", [count, rest], axis=0)
        target = write.constant("target", np.zeros(1, np.int64))
        for layer in self._layers:
            block = f"blocks.{layer}"
            normed = write.norm(f"{block}.attention_norm", tokens)
            key, value = (write.linear(f"{block}.{part}", normed) for part in ("key", "value"))
            if layer == self._layers[-1]:
                tokens, normed = (write.add("Gather", [each, target], axis=1)[0] for each in (tokens, normed))
            query = write.linear(f"{block}.query", normed)
            past = [write.add("Expand", [f"{kind}_{layer}", copies])[0] for kind in ("key", "value")]
            attended = write.attend(query, key, value, past, presents=2)[0]
            tokens = write.close(block, tokens, attended)
        score = write.linear("score", write.norm("score_norm", tokens))
        ids = helper.make_tensor_value_info("candidates", TensorProto.INT64, ["N", len(tables)])
        shape: list[str | int | None] = [1, network.heads, "L", network.head_width]
        past_values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in self._past_names()]
        return write.open_session([ids, *past_values], [score], self._threads)

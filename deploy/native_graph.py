"""The `user_encoder` graph as Triton's own onnxruntime backend can serve it: with its checks inside.

The native backend hands tensors to a graph and back, and does nothing else. So what the Python model does around the
exported graph is put into one: padding is stripped, an empty history becomes one event of padding, and a history that
is not valid (ids outside a vocabulary, too many events or fields) is not encoded. A graph cannot say what is wrong; it
gives such a user no release, and `doc_fusion` refuses user KV without its release. The exported graph is not touched.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from kvcast.contract.errors import ArtefactError
from kvcast.contract.manifest import Manifest
from kvcast.contract.report import CacheResult, Report
from kvcast.contract.tensors import ENCODE_REPORT, HISTORY, MANIFEST, RELEASE, USER_ENCODER, USER_KEYS, USER_VALUES
from kvcast.deploy.native_backend import DYNAMIC, GraphTensor

# Of every value that is added; none of the exporter's begins so.
PREFIX = "native_"
EVENTS = f"{PREFIX}events"
FINGERPRINT = f"{PREFIX}fingerprint"

# native_events: what is encoded, at least one event of padding. native_is_valid: whether that is what the user sent.
# Everything that is refused is encoded as an empty history: it costs next to nothing, and no id is out of range. The
# axes of the input have names of their own, lest ONNX Runtime take them for those of the exported graph.
CHECKS = """\
checks (int64[users, rows_sent, columns_sent] {history})
    => (int64[users, L, {width}] {prefix}events, bool[users, 1] {prefix}is_valid)
<int64[1] {prefix}zero = {{0}}, int64[1] {prefix}one = {{1}}, int64[1] {prefix}two = {{2}},
 int64[1] {prefix}limit = {{{limit}}}, int64[1] {prefix}width = {{{width}}},
 int64[{width}] {prefix}vocabularies = {{{vocabularies}}},
 int64[2] {prefix}rows_and_fields = {{1, 2}}, int64[2] {prefix}users_and_fields = {{0, 2}}>
{{
    {prefix}shape = Shape({history})
    {prefix}users = Gather({prefix}shape, {prefix}zero)
    {prefix}length = Gather({prefix}shape, {prefix}one)
    {prefix}fields = Gather({prefix}shape, {prefix}two)
    {prefix}is_short = LessOrEqual({prefix}length, {prefix}limit)
    {prefix}is_wide = Equal({prefix}fields, {prefix}width)
    {prefix}has_shape = And({prefix}is_short, {prefix}is_wide)
    {prefix}end = Where({prefix}has_shape, {prefix}limit, {prefix}zero)
    {prefix}cut = Slice({history}, {prefix}zero, {prefix}end, {prefix}one)
    {prefix}cut_shape = Shape({prefix}cut)
    {prefix}cut_length = Gather({prefix}cut_shape, {prefix}one)
    {prefix}ids_shape = Concat <axis = 0> ({prefix}users, {prefix}cut_length, {prefix}width)
    {prefix}ids = Reshape <allowzero = 1> ({prefix}cut, {prefix}ids_shape)

    {prefix}row_shape = Concat <axis = 0> ({prefix}users, {prefix}one, {prefix}width)
    {prefix}row = ConstantOfShape <value = int64[1] {{0}}> ({prefix}row_shape)
    {prefix}rows = Concat <axis = 1> ({prefix}ids, {prefix}row)
    {prefix}is_negative = Less({prefix}rows, {prefix}zero)
    {prefix}is_unknown = GreaterOrEqual({prefix}rows, {prefix}vocabularies)
    {prefix}is_outside = Or({prefix}is_negative, {prefix}is_unknown)
    {prefix}outside = Cast <to = 6> ({prefix}is_outside)
    {prefix}user_outside = ReduceMax <keepdims = 1> ({prefix}outside, {prefix}rows_and_fields)
    {prefix}is_user_outside = Cast <to = 9> ({prefix}user_outside)
    {prefix}known = Where({prefix}is_user_outside, {prefix}zero, {prefix}rows)

    {prefix}is_padding = Equal({prefix}known, {prefix}zero)
    {prefix}is_field = Not({prefix}is_padding)
    {prefix}field = Cast <to = 6> ({prefix}is_field)
    {prefix}event = ReduceMax <keepdims = 0> ({prefix}field, {prefix}users_and_fields)
    {prefix}is_event = Cast <to = 9> ({prefix}event)
    {prefix}found = Compress <axis = 1> ({prefix}known, {prefix}is_event)
    {prefix}found_shape = Shape({prefix}found)
    {prefix}found_length = Gather({prefix}found_shape, {prefix}one)
    {prefix}missing = Sub({prefix}one, {prefix}found_length)
    {prefix}blank_length = Max({prefix}missing, {prefix}zero)
    {prefix}blank_shape = Concat <axis = 0> ({prefix}users, {prefix}blank_length, {prefix}width)
    {prefix}blank = ConstantOfShape <value = int64[1] {{0}}> ({prefix}blank_shape)
    {prefix}events = Concat <axis = 1> ({prefix}found, {prefix}blank)

    {prefix}is_inside = Not({prefix}is_user_outside)
    {prefix}has_ids = Squeeze({prefix}is_inside, {prefix}two)
    {prefix}is_valid = And({prefix}has_ids, {prefix}has_shape)
}}
"""

# What the Python model adds to the KV. A string a user is needed for each of the two texts.
REPLY = """\
reply (bool[users, 1] {prefix}is_valid, uint8[users, 32] {prefix}fingerprint, int64[1] {prefix}users,
       string[1, 1] {prefix}manifest, string[1, 1] {prefix}report)
    => (uint8[users, 32] {release}, string[users, 1] {manifest}, string[users, 1] {report})
<int64[1] {prefix}column = {{1}}, uint8[1] {prefix}no_release = {{0}}>
{{
    {release} = Where({prefix}is_valid, {prefix}fingerprint, {prefix}no_release)
    {prefix}text_shape = Concat <axis = 0> ({prefix}users, {prefix}column)
    {manifest} = Expand({prefix}manifest, {prefix}text_shape)
    {report} = Expand({prefix}report, {prefix}text_shape)
}}
"""


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        ArtefactError: it cannot be read.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtefactError(f"{path}: not an ONNX graph ({type(error).__name__}: {error})") from error


def write_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph whose weights lie in a file beside `path`, and check it as a whole.

    Raises:
        ArtefactError: it is not valid.
    """
    onnx.save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ArtefactError(f"{path}: not a valid ONNX graph: {error}") from error


def list_inputs(model: onnx.ModelProto) -> dict[str, GraphTensor]:
    """Return the inputs by name."""
    return _list_tensors(model.graph.input)


def list_outputs(model: onnx.ModelProto) -> dict[str, GraphTensor]:
    """Return the outputs by name."""
    return _list_tensors(model.graph.output)


def make_native_graph(exported: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """Put checks before, and the small tensors behind, an exported `user_encoder`.

    Args:
        exported: the graph that lies beside `manifest`; its weights may be elsewhere.
        manifest: what it accepts.

    Returns:
        A graph with the tensors of `USER_ENCODER`, whose weights are where they were.

    Raises:
        ArtefactError: it is not the graph of a `user_encoder`.
    """
    _check_exported(exported, manifest)
    checks, reply = _make_checks(manifest), _make_reply(manifest)
    body = onnx.ModelProto()
    body.CopyFrom(exported)
    _rename(body.graph, {HISTORY.name: EVENTS, RELEASE.name: FINGERPRINT})
    outputs = {output.name: output for output in (*body.graph.output, *reply.output)}  # the release is the reply's
    for name in (USER_KEYS.name, USER_VALUES.name):
        _name_slots(outputs[name])
    native = onnx.ModelProto()
    native.CopyFrom(body)
    graph = native.graph
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*checks.node, *body.graph.node, *reply.node])
    graph.input.extend(checks.input)
    graph.output.extend(outputs[tensor.name] for tensor in USER_ENCODER.outputs)
    graph.initializer.extend([*checks.initializer, *reply.initializer])
    graph.value_info.append(checks.output[0])
    return native


def _make_checks(manifest: Manifest) -> onnx.GraphProto:
    """Return what comes before the exported graph."""
    fields = manifest.history_fields
    vocabularies = ", ".join(str(field.vocab_size) for field in fields)
    sizes = {"width": len(fields), "limit": manifest.limits.history, "vocabularies": vocabularies}
    return parser.parse_graph(CHECKS.format(prefix=PREFIX, history=HISTORY.name, **sizes))


def _make_reply(manifest: Manifest) -> onnx.GraphProto:
    """Return what comes behind it, with its texts: the manifest, and a report that there is no cache."""
    names = {"release": RELEASE.name, "manifest": MANIFEST.name, "report": ENCODE_REPORT.name}
    reply = parser.parse_graph(REPLY.format(prefix=PREFIX, **names))
    texts = {"manifest": manifest.to_json(), "report": Report(CacheResult.OFF).to_json()}
    for name, text in texts.items():
        reply.initializer.append(numpy_helper.from_array(np.array([[text]], np.object_), f"{PREFIX}{name}"))
    return reply


def _check_exported(exported: onnx.ModelProto, manifest: Manifest) -> None:
    """Check that a graph has the tensors of an exported `user_encoder`."""
    width = len(manifest.history_fields)
    outputs = {tensor.name: (tensor.dtype, 1 + len(tensor.axes)) for tensor in (USER_KEYS, USER_VALUES, RELEASE)}
    got_inputs = list_inputs(exported)
    if got_inputs != {HISTORY.name: GraphTensor(HISTORY.dtype, [DYNAMIC, DYNAMIC, width])}:
        raise ArtefactError(
            f"{USER_ENCODER.name}: expected the one input {HISTORY.name} {HISTORY.dtype} [-1, -1, {width}], "
            f"got {_describe(got_inputs)}: export again"
        )
    got_outputs = list_outputs(exported)
    if {name: (tensor.dtype, len(tensor.dims)) for name, tensor in got_outputs.items()} != outputs:
        raise ArtefactError(
            f"{USER_ENCODER.name}: expected the outputs {', '.join(outputs)} as export makes them, "
            f"got {_describe(got_outputs)}: export again"
        )


def _list_tensors(values: Iterable[onnx.ValueInfoProto]) -> dict[str, GraphTensor]:
    tensors = {}
    for value in values:
        kind = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else DYNAMIC for dim in kind.shape.dim]
        tensors[value.name] = GraphTensor(_name_dtype(kind.elem_type), dims)
    return tensors


def _name_dtype(elem_type: int) -> str:
    """Return Triton's name of an ONNX dtype."""
    name: str = onnx.TensorProto.DataType.Name(elem_type)
    return {"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "BFLOAT16": "BF16"}.get(name, name)


def _describe(tensors: dict[str, GraphTensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype} {tensor.dims}" for name, tensor in tensors.items()) or "none"


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give values other names wherever they are made or read, in branches too."""
    for each in _walk(graph):
        for node in each.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        if each is not graph:
            for output in each.output:
                output.name = names.get(output.name, output.name)


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g)


def _name_slots(output: onnx.ValueInfoProto) -> None:
    """Let the slots of a KV output depend on no axis of the input: the padding in that is gone."""
    for dim in output.type.tensor_type.shape.dim[1:]:
        if not dim.HasField("dim_value"):
            dim.dim_param = "slots"

"""`kvcast deploy native`: a model repository in which `user_encoder` is served by Triton's own onnxruntime backend.

The graph is the exported one with the Python model's checks inside (native_graph.py); `doc_fusion` and `ranker` are
copied as they are. The configuration is written here and then held against the graph by the rules of the backend,
which refuses to load what does not fit: names, dtypes, and dims that it compares exactly. The command starts nothing.
"""

import argparse
import dataclasses
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from kvcast.contract.errors import ArtefactError
from kvcast.contract.manifest import MANIFEST_FILE, ONNX_FILE, Manifest, hash_file, read_manifest
from kvcast.contract.tensors import DOC_FUSION, MAX_BATCH_SIZE, RANKER, USER_ENCODER
from kvcast.server.installation import ServerError
from kvcast.server.releases import ReleaseStore
from kvcast.server.repository import check_repository, expand_models
from kvcast.server.view import CONFIG_FILE

BACKEND = "onnxruntime"
# The size of an axis that may be of any size.
DYNAMIC = -1
# TF32 rounds what goes into a GEMM to 10 bits: scores would no longer be those that were proved.
EXACT_CUDA = """\
optimization {
  execution_accelerators {
    gpu_execution_accelerator [
      { name: "cuda" parameters { key: "use_tf32" value: "0" } }
    ]
  }
}
"""


class GraphTensor(NamedTuple):
    """An input or output of a graph: Triton's name of its dtype, and its axes with that of the users."""

    dtype: str
    dims: list[int]


@dataclass(frozen=True)
class NativeOptions:
    """What the configuration leaves to the operator. threads: of an instance's session, 0 for ONNX Runtime's choice."""

    device: str = "cpu"
    threads: int = 0
    instances: int = 1


def write_native_repository(repository: Path, out: Path, options: NativeOptions) -> Manifest:
    """Write the repository with the native `user_encoder`, whole or not at all.

    Args:
        repository: an exported one, as `kvcast serve` would serve it.
        out: a folder that is not there yet.
        options: for the configuration.

    Returns:
        The manifest of the encoder.

    Raises:
        ServerError: there is no export, or something lies at `out`.
        ArtefactError: the exported encoder is damaged, or cannot be served so.
    """
    check_repository(repository, [RANKER.name], None)
    if out.exists():
        raise ServerError(f"{out} is there already: remove it, or name another folder")
    store = ReleaseStore(repository)
    number = store.find_served(expand_models([RANKER.name]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".kvcast-native-") as folder:
        staging = Path(folder) / out.name
        for model in (RANKER.name, DOC_FUSION.name):
            (staging / model).mkdir(parents=True)
            shutil.copyfile(repository / model / CONFIG_FILE, staging / model / CONFIG_FILE)
        (staging / RANKER.name / str(number)).mkdir()
        _copy_model(store.find_folder(DOC_FUSION.name, number), staging / DOC_FUSION.name / str(number))
        encoder = staging / USER_ENCODER.name / str(number)
        manifest = _write_encoder(store.find_folder(USER_ENCODER.name, number), encoder, options)
        check_native_repository(staging)
        staging.rename(out)
    return manifest


def check_native_repository(repository: Path) -> list[Path]:
    """Hold the encoder's configuration against its graphs, as the backend will at load.

    Args:
        repository: what `write_native_repository` wrote, perhaps edited since.

    Returns:
        The graphs.

    Raises:
        ArtefactError: it would be refused, or would not serve what `doc_fusion` and callers need.
    """
    from kvcast.deploy import native_graph  # noqa: PLC0415 needs onnx, which `kvcast deploy size` does without

    folder = repository / USER_ENCODER.name
    try:
        config = parse_config((folder / CONFIG_FILE).read_text(), folder / CONFIG_FILE)
    except OSError as error:
        raise ArtefactError(f"{folder / CONFIG_FILE}: cannot be read ({error.strerror})") from error
    graphs = sorted(folder.glob(f"[0-9]*/{ONNX_FILE}"))
    if not graphs:
        raise ArtefactError(f"{folder}: expected a version with {ONNX_FILE}, got none: `kvcast deploy native` again")
    for path in graphs:
        model = native_graph.read_graph(path)
        check_config(config, native_graph.list_inputs(model), native_graph.list_outputs(model))
    return graphs


def parse_config(text: str, path: Path) -> Any:
    """Parse a `config.pbtxt` into Triton's own record.

    Raises:
        ArtefactError: Triton could not read it.
    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ArtefactError(f"{path}: not a model configuration: {error}") from error


def check_config(config: Any, inputs: Mapping[str, GraphTensor], outputs: Mapping[str, GraphTensor]) -> None:
    """Hold a configuration against a graph.

    The backend wants every input of the graph; of each tensor its dtype, and a first axis of any size where requests
    are batched; of an input the fixed sizes; of an output every axis, -1 where and only where the graph has any size.
    That all tensors of `USER_ENCODER` are there is what our own models and clients want.

    Args:
        config: a `ModelConfig`.
        inputs: of the graph, by name.
        outputs: likewise.

    Raises:
        ArtefactError: the backend would refuse to load it, or a tensor of the contract is missing.
    """
    if config.backend != BACKEND:
        raise ArtefactError(f'{USER_ENCODER.name}: expected backend "{BACKEND}", got "{config.backend}"')
    if config.max_batch_size != MAX_BATCH_SIZE:
        raise ArtefactError(
            f"{USER_ENCODER.name}: expected max_batch_size {MAX_BATCH_SIZE}, as {RANKER.name} has, "
            f"got {config.max_batch_size}"
        )
    for side, wanted, configured, in_graph in (
        ("input", USER_ENCODER.inputs, config.input, inputs),
        ("output", USER_ENCODER.outputs, config.output, outputs),
    ):
        missing = {tensor.name for tensor in wanted} | (set(in_graph) if side == "input" else set())
        missing -= {tensor.name for tensor in configured}
        if missing:
            raise ArtefactError(
                f"{USER_ENCODER.name}: expected {side} {sorted(missing)[0]} in {CONFIG_FILE}, "
                f"got {', '.join(tensor.name for tensor in configured) or 'none'}"
            )
        for tensor in configured:
            _check_tensor(side, tensor, in_graph)


def make_config(inputs: Mapping[str, GraphTensor], outputs: Mapping[str, GraphTensor], options: NativeOptions) -> str:
    """Return the `config.pbtxt` of the graph."""
    accelerators = f"\n{EXACT_CUDA}" if options.device == "gpu" else ""
    return f"""\
# Made by `kvcast deploy native`: user_encoder on Triton's own onnxruntime backend, its checks inside the graph.
name: "{USER_ENCODER.name}"
backend: "{BACKEND}"
max_batch_size: {MAX_BATCH_SIZE}

# -1 and the other sizes are the graph's, to the letter, or the backend refuses to load it.
input [
{_write_tensors(inputs)}
]
output [
{_write_tensors(outputs)}
]

# An instance is a session with weights of its own.
instance_group [ {{ count: {options.instances} kind: KIND_{options.device.upper()} }} ]
{accelerators}
# Without dynamic_batching: it would join equal lengths alone, and a lone request would gain nothing.
# 0: ONNX Runtime's choice, the physical cores. They are shared with doc_fusion.
parameters {{ key: "intra_op_thread_count" value {{ string_value: "{options.threads}" }} }}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR", help="an export")
    parser.add_argument(
        "--out", type=Path, default=Path("build/native"), metavar="DIR", help="what to write (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default=NativeOptions.device)
    parser.add_argument(
        "--threads",
        type=int,
        default=NativeOptions.threads,
        metavar="N",
        help="of each instance: cores that it may use",
    )
    parser.add_argument("--instances", type=int, default=NativeOptions.instances, metavar="N")
    parser.add_argument("--check", action="store_true", help="write nothing: hold what lies in --out against its graph")


def run(arguments: argparse.Namespace) -> int:
    """Write or check the repository.

    Raises:
        ServerError, ArtefactError: what is asked cannot be done.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ServerError("onnx is not installed, which reads and writes the graph: pip install 'kvcast[export]'")
    if arguments.check:
        graphs = check_native_repository(arguments.out)
        print(f"{arguments.out / USER_ENCODER.name / CONFIG_FILE} fits {', '.join(map(str, graphs))}")
        return 0
    options = NativeOptions(arguments.device, arguments.threads, arguments.instances)
    manifest = write_native_repository(arguments.repository, arguments.out, options)
    print(
        f"{arguments.out}: {manifest.config}, release {manifest.release[:12]}, {USER_ENCODER.name} for the "
        f"{BACKEND} backend; its configuration fits its graph"
    )
    return 0


def _write_encoder(source: Path, target: Path, options: NativeOptions) -> Manifest:
    """Write the native encoder's version folder and, beside it, its configuration; return its manifest."""
    from kvcast.deploy import native_graph  # noqa: PLC0415 needs onnx, which `kvcast deploy size` does without

    exported = read_manifest(source)
    target.mkdir(parents=True)
    for name, expected in exported.files.items():
        if hash_file(source / name) != expected:
            raise ArtefactError(f"{source / name}: not the file that its manifest describes: export again")
        if name != ONNX_FILE:  # weights and golden request are the same
            shutil.copyfile(source / name, target / name)
    model = native_graph.make_native_graph(native_graph.read_graph(source / ONNX_FILE), exported)
    native_graph.write_graph(model, target / ONNX_FILE)
    manifest = dataclasses.replace(exported, files={**exported.files, ONNX_FILE: hash_file(target / ONNX_FILE)})
    (target / MANIFEST_FILE).write_text(manifest.to_json())
    inputs, outputs = native_graph.list_inputs(model), native_graph.list_outputs(model)
    (target.parent / CONFIG_FILE).write_text(make_config(inputs, outputs, options))
    return manifest


def _copy_model(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile)
    target.chmod(0o755)  # that of a published release is read-only


def _check_tensor(side: str, tensor: Any, in_graph: Mapping[str, GraphTensor]) -> None:
    what = f"{USER_ENCODER.name}: {side} {tensor.name}"
    if tensor.name not in in_graph:
        raise ArtefactError(f"{what}: expected one of {ONNX_FILE}'s {', '.join(in_graph)}")
    dtype, dims = in_graph[tensor.name]
    got_dtype = model_config_pb2.DataType.Name(tensor.data_type)
    if got_dtype != f"TYPE_{dtype}":
        raise ArtefactError(f"{what}: expected TYPE_{dtype}, as {ONNX_FILE} has, got {got_dtype}")
    if tensor.HasField("reshape") or (side == "input" and (tensor.optional or tensor.allow_ragged_batch)):
        raise ArtefactError(f"{what}: expected neither reshape nor optional nor allow_ragged_batch")
    got = [DYNAMIC, *tensor.dims]  # the batch axis
    is_exact = side == "output"
    fits = len(got) == len(dims) and all(
        mine == its for mine, its in zip(got, dims, strict=True) if is_exact or its != DYNAMIC
    )
    if dims[:1] != [DYNAMIC] or not fits:
        raise ArtefactError(f"{what}: expected dims {dims[1:]}, as {ONNX_FILE} has, got {got[1:]}")


def _write_tensors(tensors: Mapping[str, GraphTensor]) -> str:
    lines = [
        f'  {{ name: "{name}" data_type: TYPE_{tensor.dtype} dims: [ {", ".join(map(str, tensor.dims[1:]))} ] }}'
        for name, tensor in tensors.items()
    ]
    return ",\n".join(lines)

"""The hand-written config.pbtxt files and the rules of the rooms, held against the contract and the design."""

import ast
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from kvcast.protocol.tensors import MAX_BATCH_SIZE, MODELS, RANKER_RESIDENT, USER_ENCODER, ModelSpec, TensorSpec
from kvcast.serving.options import CACHE_PARAMETERS, QUEUE_PARAMETERS, SESSION_PARAMETERS

ROOT = Path(__file__).parents[2]
MODEL_NAMES = {model.name: model for model in MODELS}
# room → the rooms that it may import (each may import itself); see docs/architecture.md
MAY_IMPORT = {
    "protocol": set(),
    "networks": {"protocol"},
    "synthetic": {"protocol"},
    "export": {"protocol", "networks"},
    "train": {"protocol", "networks"},
    "serving": {"protocol"},
    "model_repository": {"serving"},
    "gateway": {"protocol"},
    "server": {"protocol", "gateway"},
    "client": {"protocol"},
    "perf": {"client", "synthetic", "protocol", "networks", "serving", "server"},
}
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "tritonclient",
    "triton_python_backend_utils",
    "safetensors",
    "pyarrow",
    "sklearn",
}
MAY_USE = {
    "protocol": set(),
    "networks": {"torch", "safetensors"},
    "synthetic": {"pyarrow"},
    "train": {"torch", "safetensors", "pyarrow", "sklearn"},
    "export": {"torch", "onnx", "onnxruntime"},
    "serving": {"onnxruntime"},
    "model_repository": {"triton_python_backend_utils"},
    "gateway": {"tritonclient"},
    "server": set(),
    "client": {"tritonclient"},
}


def read_config(model: str) -> model_config_pb2.ModelConfig:
    text = (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def describe(tensor: TensorSpec) -> tuple[str, str, list[int]]:
    dims = [int(axis) if axis.isdigit() else -1 for axis in tensor.axes]
    return tensor.name, f"TYPE_{tensor.dtype}", dims


@pytest.mark.parametrize("spec", MODELS, ids=lambda model: model.name)
def test_config_says_what_the_contract_says(spec: ModelSpec):
    config = read_config(spec.name)
    names = model_config_pb2.DataType.Name
    assert config.name == spec.name
    assert config.max_batch_size == MAX_BATCH_SIZE
    for tensors, specs in ((config.input, spec.inputs), (config.output, spec.outputs)):
        assert [(each.name, names(each.data_type), list(each.dims)) for each in tensors] == [
            describe(each) for each in specs
        ]
    if spec.steps:
        assert config.platform == "ensemble"
        assert tuple(step.model_name for step in config.ensemble_scheduling.step) == spec.steps
        return
    assert config.backend == "python"
    # With a queue policy Triton 2.51's batcher can sleep on a waiting request; the runtime has a queue of its own.
    assert not config.HasField("dynamic_batching")
    assert not config.HasField("response_cache"), "it stores errors"
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_CPU]
    caches = CACHE_PARAMETERS if spec in (USER_ENCODER, RANKER_RESIDENT) else ()
    assert set(config.parameters) == {*SESSION_PARAMETERS, *QUEUE_PARAMETERS, *caches}


def test_the_ensemble_feeds_every_input_of_its_steps():
    for step in read_config("ranker").ensemble_scheduling.step:
        assert set(step.input_map) == {tensor.name for tensor in MODEL_NAMES[step.model_name].inputs}
        for inner, outer in [*step.input_map.items(), *step.output_map.items()]:
            assert inner == outer, "one name for one thing"


def test_the_repository_holds_models_and_nothing_else():
    folders = {path.name for path in (ROOT / "model_repository").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(MODEL_NAMES)


def find_room(room: str) -> Path:
    return ROOT / room if room in {"model_repository", "perf"} else ROOT / "src" / "kvcast" / room


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    for path in find_room(room).rglob("*.py"):
        for module in imported_modules(path):
            top, _, rest = module.partition(".")
            if top == "kvcast":
                other = rest.partition(".")[0]
                assert other in MAY_IMPORT[room] | {room}, f"{path.relative_to(ROOT)} imports {module}"
            elif room in MAY_USE:
                assert top not in HEAVY - MAY_USE[room], f"{path.relative_to(ROOT)} imports {module}"


def test_every_room_has_its_rule():
    assert {path.parent.name for path in ROOT.glob("src/kvcast/*/__init__.py")} <= set(MAY_IMPORT)


def test_adapters_are_thin():
    for path in (ROOT / "model_repository").rglob("model.py"):
        assert len(path.read_text().splitlines()) <= 30, path


# What reads a file by running what it says.
RUNS_WHAT_IT_READS = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "shelve",
}
# numpy's reads a pickle if asked to, pandas's and torch's does by itself; exported weights are safetensors.
LOADERS = {
    "numpy.load",
    "np.load",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.save",
    "pandas.read_pickle",
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_nothing_is_pickled_and_nothing_changes_the_import_path(room):
    for path in find_room(room).rglob("*.py"):
        used = {module.partition(".")[0] for module in imported_modules(path)}
        assert not used & RUNS_WHAT_IT_READS, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in LOADERS | {"eval", "exec", "__import__"}, path
                assert not {keyword.arg for keyword in node.keywords} & {"allow_pickle", "weights_only"}, path
        assert "sys.path" not in path.read_text(), path

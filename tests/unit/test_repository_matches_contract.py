"""The hand-written config.pbtxt files and adapters, held against the contract; what no code may do."""

import ast
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from kvcast.protocol.tensors import (
    KV_ORIGIN,
    MAX_BATCH_SIZE,
    MODELS,
    RANKER_RESIDENT,
    USER_ENCODER,
    ModelSpec,
    TensorSpec,
)
from kvcast.serving.options import CACHE_PARAMETERS, SESSION_PARAMETERS

ROOT = Path(__file__).parents[2]
MODEL_NAMES = {model.name: model for model in MODELS}


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
    assert [each.name for each in config.input if each.optional] == [
        each.name for each in spec.inputs if each is KV_ORIGIN
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
    assert set(config.parameters) == {*SESSION_PARAMETERS, *caches}


def test_the_ensemble_feeds_every_input_of_its_steps():
    for step in read_config("ranker").ensemble_scheduling.step:
        assert set(step.input_map) == {tensor.name for tensor in MODEL_NAMES[step.model_name].inputs}
        for inner, outer in [*step.input_map.items(), *step.output_map.items()]:
            assert inner == outer, "one name for one thing"


def test_the_repository_holds_models_and_nothing_else():
    folders = {path.name for path in (ROOT / "model_repository").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(MODEL_NAMES)


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


def test_adapters_are_thin():
    for path in (ROOT / "model_repository").rglob("model.py"):
        assert len(path.read_text().splitlines()) <= 30, path
        assert imported_modules(path) == {"typing", "triton_python_backend_utils", "kvcast.serving"}, path


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


def list_changed(path: Path) -> list[str]:
    """Return what a file assigns to, deletes, or calls a method of."""
    changed: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text())):
        changed += getattr(node, "targets", [])
        changed += [node.target] if isinstance(node, ast.AugAssign) else []
        changed += [node.func] if isinstance(node, ast.Call) else []
    return [ast.unparse(each) for each in changed]


@pytest.mark.parametrize("folder", ["client", "model_repository", "perf", "src"])
def test_nothing_is_pickled_and_nothing_changes_the_import_path(folder):
    for path in (ROOT / folder).rglob("*.py"):
        used = {module.partition(".")[0] for module in imported_modules(path)}
        assert not used & RUNS_WHAT_IT_READS, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in LOADERS | {"eval", "exec", "__import__"}, path
                assert not {keyword.arg for keyword in node.keywords} & {"allow_pickle", "weights_only"}, path
        assert not [name for name in list_changed(path) if name.startswith("sys.path")], path

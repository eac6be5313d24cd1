"""An export with graphs of the cache: the files of a full one; or a trace, where anything but weights has changed."""

import dataclasses
import errno
import importlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvcast.export.cache import CACHE_VARIABLE, Entry, LimitProofs, NoKeyError, TraceCache, find_cache, make_key
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.export.template import GraphTemplate, split_folding, write_graphs
from kvcast.export.trace import trace_model
from kvcast.networks.interface import RankingNetwork
from kvcast.networks.weights import draw_weights
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.manifest import hash_file, read_manifest
from kvcast.protocol.tensors import DOC_FUSION, EXPORTED_MODELS
from tests.support import draw_request, make_config, make_network
from tests.unit.differing import Plain

CONFIG = make_config(layers=1)
TRACED = "is traced"


class GatesByAWeight(Plain):
    """What the graph reads are functions of weights: a gate, a product of two, a tied table; and a buffer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(1))
        self.left, self.right = (nn.Parameter(torch.zeros(config.network.width)) for _ in range(2))
        self.register_buffer("shift", torch.linspace(0, 1, config.network.width))
        self.tables["attribute_1"].weight = self.tables["attribute_2"].weight

    def change_items(self, tokens: Tensor) -> Tensor:
        mixed = tokens * (self.left * self.right)
        return torch.sigmoid(self.gate) * mixed + torch.where(self.gate > 0, tokens, -tokens) + self.shift


class DerivesAFloat(Plain):
    """A number that is computed of a weight when weights are set, and then is a constant of the trace."""

    scale = 1.0

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self.scale = 1 + float(self.score.weight.abs().max())

    def change_items(self, tokens: Tensor) -> Tensor:
        return tokens * self.scale


class DerivesATensor(DerivesAFloat):
    """The same with a tensor, which torch takes for a constant."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self.scale = [self.score.weight[0] * 2]

    def change_items(self, tokens: Tensor) -> Tensor:
        return tokens * self.scale[0]


class DerivesInItsClass(DerivesAFloat):
    """The same where no module holds it: in the class."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        DerivesInItsClass.scale = vars(self).pop("scale")


class ListsAWeight(Plain):
    """A weight in a list is not found by its name: a constant of the trace."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.listed = [self.score.weight]

    def change_items(self, tokens: Tensor) -> Tensor:
        return tokens * self.listed[0][0]


class KeepsABoundMethod(Plain):
    """A method of torch's own, of a tensor."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self.add = (self.score.weight[0] * 2).add

    def change_items(self, tokens: Tensor) -> Tensor:
        return self.add(tokens)


class KeepsASparseTensor(Plain):
    """A tensor whose bytes are not in one place; and one of a type that numpy lacks, which can be compared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.other = [torch.ones(2, dtype=torch.bfloat16)]
        self.sparse = torch.eye(2).to_sparse()


class ReadsTheEnvironment(Plain):
    """A number that comes from nowhere that can be looked at."""

    def change_items(self, tokens: Tensor) -> Tensor:
        return tokens * float(os.environ.get("SCALE", "1"))


class KeepsAClosure(Plain):
    """What it computes with cannot be told from outside."""

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        first = self.score.weight[0, 0]
        self.shift = lambda tokens: tokens + first


def name_family(family: type[RankingNetwork]) -> ModelConfig:
    name = f"{family.__module__}:{family.__qualname__}"
    return dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=name))


def build(family: type[RankingNetwork], seed: int = 0, config: ModelConfig = CONFIG) -> RankingNetwork:
    network = family(config).eval().requires_grad_(False)
    draw_weights(network, seed)
    return network


def export(config: ModelConfig, folder: Path, seed: int, cache: TraceCache | None = None) -> list[str]:
    """Export, and return what was said."""
    said: list[str] = []
    export_release(config, WeightsSource(seed=seed), folder, said.append, cache)
    return said


def hash_files(folder: Path) -> dict[str, str]:
    names = ("model.onnx", "weights.data", "golden.json")
    return {
        f"{model.name}/{name}": hash_file(folder / model.name / "1" / name)
        for model in EXPORTED_MODELS
        for name in names
    }


def test_an_export_of_new_weights_alone_gives_the_files_of_a_full_one(tmp_path):
    config, cache = name_family(GatesByAWeight), TraceCache(tmp_path / "cache")
    assert any(TRACED in line for line in export(config, tmp_path / "first", 0, cache))
    assert not any(TRACED in line for line in export(config, tmp_path / "second", 1, cache))
    assert any(TRACED in line for line in export(config, tmp_path / "full", 1))
    assert hash_files(tmp_path / "second") == hash_files(tmp_path / "full")
    assert hash_files(tmp_path / "second") != hash_files(tmp_path / "first")
    second, full = (read_manifest(tmp_path / name / "ranker_full" / "1") for name in ("second", "full"))
    assert (second.release, second.kv_id, second.files) == (full.release, full.kv_id, full.files)
    weights = [tmp_path / "second" / model.name / "1" / "weights.data" for model in EXPORTED_MODELS]
    assert len({path.stat().st_ino for path in weights}) == 1, "one file of weights"
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 1
    # A damaged entry counts as none, and is replaced.
    entry = tmp_path / "cache" / names[0]
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    network = build(GatesByAWeight, 1, config)
    assert cache.load(make_key(network)) is None


@pytest.fixture(scope="module")
def templates() -> tuple[GraphTemplate, ...]:
    """Those of `Plain`."""
    with torch.inference_mode():
        return tuple(trace_model(build(Plain), model.name).template for model in EXPORTED_MODELS)


def test_a_stale_entry_is_noticed_by_the_proofs_and_replaced(templates, tmp_path):
    config, cache = name_family(Plain), TraceCache(tmp_path / "cache")
    wrong = [dataclasses.replace(each, structure=each.structure.replace(b"Tanh", b"Sinh")) for each in templates]
    assert any(b"Sinh" in each.structure for each in wrong)
    key = make_key(build(Plain, 0, config))
    cache.store(key, Entry(tuple(wrong), LimitProofs("00", 1, 0)))
    said = export(config, tmp_path / "made", 0, cache)
    assert any("property 0" in line and "all are traced again" in line for line in said)
    assert sum(TRACED in line for line in said) == len(EXPORTED_MODELS)
    assert not any(b"Sinh" in path.read_bytes() for path in (tmp_path / "made").rglob("*.onnx"))
    assert cache.load(key).templates == templates


def test_weights_that_are_written_during_an_export_are_refused(templates, tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_file(build(Plain, 0).state_dict(), file)

    def trace(*_: object) -> dict[str, GraphTemplate]:
        save_file(build(Plain, 1).state_dict(), file)
        return {each.model: each for each in templates}

    monkeypatch.setattr("kvcast.export.pipeline.trace_network", trace)
    with pytest.raises(ConfigError, match=r"weights\.safetensors: they were written again during the export"):
        export_release(name_family(Plain), WeightsSource(file), tmp_path / "made", lambda _: None)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("seconds", "taken_over"), [((5.0, 1.0), True), ((1.0, 5.0), False)], ids=["longer than the rest", "shorter"]
)
def test_proofs_at_the_limits_are_taken_over_only_where_they_take_longest(seconds, taken_over, templates, tmp_path):
    config, cache = name_family(Plain), TraceCache(tmp_path / "cache")
    cache.store(make_key(build(Plain, 0, config)), Entry(templates, LimitProofs("ab" * 32, *seconds)))
    said = export(config, tmp_path / "made", 1, cache)
    assert not any(TRACED in line for line in said)
    manifest = read_manifest(tmp_path / "made" / "ranker_full" / "1")
    assert manifest.parity.limits == ("ab" * 32 if taken_over else manifest.release)
    assert any("at the limits were proved of these graphs with release abab" in line for line in said) == taken_over


# What a key knows.


def test_weights_and_the_place_of_files_do_not_change_a_key():
    assert make_key(make_network(CONFIG, 0)) == make_key(make_network(CONFIG, 1))
    moved = dataclasses.replace(CONFIG, weights=Path("elsewhere.safetensors"))
    assert make_key(make_network(moved)) == make_key(make_network(CONFIG))
    assert make_key(build(GatesByAWeight, 0)) == make_key(build(GatesByAWeight, 1))


@pytest.mark.parametrize("family", [DerivesAFloat, DerivesATensor, DerivesInItsClass, ListsAWeight])
def test_what_is_derived_of_weights_and_no_weight_changes_a_key(family):
    assert make_key(build(family, 0)) != make_key(build(family, 1))
    assert make_key(build(family, 1)) == make_key(build(family, 1))


def test_what_the_code_reads_outside_changes_a_key(monkeypatch):
    before = make_key(build(ReadsTheEnvironment))
    monkeypatch.setenv("SCALE", "1.0000001")
    assert make_key(build(ReadsTheEnvironment)) != before


@pytest.mark.parametrize(
    ("family", "held"),
    [
        (KeepsAClosure, "a function, whose content cannot be compared"),
        (KeepsABoundMethod, "a builtin_function_or_method, whose content cannot be compared"),
        (KeepsASparseTensor, "unsupported memory format"),
    ],
)
def test_what_cannot_be_compared_is_never_taken_from_the_cache(family, held):
    with pytest.raises(NoKeyError, match=f"{family.__name__} holds {held}"):
        make_key(build(family))


def test_code_configuration_and_libraries_change_a_key(tmp_path, monkeypatch):
    known = make_key(make_network(CONFIG))
    others = [make_key(make_network(make_config(layers=2))), make_key(build(Plain))]
    file = tmp_path / "family.py"
    file.write_text("import helper\nfrom tests.unit.differing import Plain as Own\n")
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=f"{file}:Own"))
    (tmp_path / "helper.py").write_text("FACTOR = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    others.append(make_key(make_network(config)))
    (tmp_path / "helper.py").write_text("FACTOR = 2\n")
    others.append(make_key(make_network(config)))
    (tmp_path / "library-2.0.dist-info").mkdir()
    others.append(make_key(make_network(config)))
    assert len({known, *others}) == 1 + len(others)


def test_the_sources_of_a_key_are_known_by_their_modules_and_a_family_that_is_installed_is_among_them(
    tmp_path, monkeypatch
):
    texts = ["FACTOR = 1\n", "FACTOR = 2\n"]
    for package, text in zip(("one_side", "other_side"), texts, strict=True):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("from . import gate\n")
        (tmp_path / package / "gate.py").write_text(text)
    (tmp_path / "one_side" / "family.py").write_text(
        "import other_side\nfrom tests.unit.differing import Plain\nclass Own(Plain):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = make_network(name_family(importlib.import_module("one_side.family").Own))
    keys = [make_key(network)]
    for package, text in zip(("one_side", "other_side"), reversed(texts), strict=True):
        (tmp_path / package / "gate.py").write_text(text)
    keys.append(make_key(network))
    monkeypatch.setattr("kvcast.export.cache.sysconfig.get_path", lambda _: str(tmp_path))
    keys.append(make_key(network))
    (tmp_path / "one_side" / "gate.py").write_text("FACTOR = 3\n")
    keys.append(make_key(network))
    assert len(set(keys)) == len(keys)


# Templates.


def test_the_least_recently_used_entries_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcast.export.cache.MOST_ENTRIES", 2)
    cache, entry = TraceCache(tmp_path / "cache"), Entry((), LimitProofs("", 0, 0))
    for index, key in enumerate("abc"):
        cache.store(key, entry)
        path = tmp_path / "cache" / f"{key}.traces"
        if path.exists():
            os.utime(path, (index, index))
    assert cache.load("a") is None
    assert cache.load("b") == cache.load("c") == entry
    assert TraceCache(Path("/proc/nowhere")).store("a", entry) is None, "a cache that cannot be written is none"


def test_entries_are_read_where_nothing_can_be_written_and_a_full_disk_keeps_no_part_of_one(tmp_path, monkeypatch):
    cache, entry = TraceCache(tmp_path / "cache"), Entry((), LimitProofs("", 0, 0))
    cache.store("a", entry)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "refused")

    with monkeypatch.context() as patch:
        patch.setattr("os.utime", refuse)
        assert cache.load("a") == entry
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        cache.store("b", entry)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.traces"]


def test_a_user_without_a_home_exports_without_a_cache(tmp_path, monkeypatch):
    assert find_cache() is not None
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", refuse)
    assert find_cache() is None


def test_values_of_one_name_in_two_branches_are_not_taken_for_each_other():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        branches (float[2] x, bool c, float[2] w) => (float[2] y) {
            y = If (c) <
                then_branch = one () => (float[2] a) { t = Neg(w) s = Exp(w) a = Mul(t, s) },
                else_branch = two () => (float[2] b) { t = Neg(x) b = Mul(t, w) }>
        }"""
    )
    structure, folding, direct = split_folding(model, {"w"})
    assert direct == ["w"]
    assert [node.op_type for node in folding.graph.node] == ["Exp"], "t is two values"
    generator = np.random.default_rng(0)
    x, w = (generator.standard_normal(2).astype(np.float32) for _ in range(2))
    s = ort.InferenceSession(folding.SerializeToString()).run(None, {"w": w})[0]
    for name, value in (("w", w), ("s", s)):
        structure.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    session, whole = (ort.InferenceSession(each.SerializeToString()) for each in (structure, model))
    for condition in (True, False):
        feeds = {"x": x, "c": np.array(condition)}
        np.testing.assert_array_equal(session.run(None, feeds)[0], whole.run(None, feeds | {"w": w})[0])


@torch.inference_mode()
def test_a_template_computes_what_the_network_does_with_any_weights(tmp_path):
    template = trace_model(build(GatesByAWeight), DOC_FUSION.name).template
    assert template.folded, "the gate and the product of two weights"
    for seed in range(4):
        network = build(GatesByAWeight, seed)
        network.gate.mul_(math.copysign(1, seed - 2))
        network.shift.mul_(seed)
        history, candidates = draw_request(CONFIG, 9, 4, seed)
        kv = network.encode_user(torch.from_numpy(history[None]))
        feeds = {
            "candidates": candidates[None],
            "user_keys_0": kv.keys[0].numpy(),
            "user_values_0": kv.values[0].numpy(),
        }
        session = template.open(network)
        scores = session.run(
            None, {each.name: feed for each, feed in zip(session.get_inputs(), feeds.values(), strict=True)}
        )[0]
        np.testing.assert_allclose(scores, network.fuse(kv, torch.from_numpy(candidates[None])), rtol=0, atol=1e-5)
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
        (tmp_path / "files").mkdir()
        write_graphs([template], network, "00", tmp_path / "files")
        written = ort.InferenceSession(tmp_path / "files" / DOC_FUSION.name / "model.onnx")
        names = [each.name for each in written.get_inputs()]
        np.testing.assert_array_equal(written.run(None, dict(zip(names, feeds.values(), strict=True)))[0], scores)

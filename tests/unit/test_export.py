"""Export: every proof can fail, names its property, and leaves the repository alone; weights are checked by name."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcast.export.__main__ import main
from kvcast.export.calls import TorchCalls
from kvcast.export.pipeline import WeightsSource, _choose_weights, export_release
from kvcast.export.proofs import ProofError, draw_sample, prove, prove_history_is_blind
from kvcast.export.release import fingerprint_release
from kvcast.networks.interface import MaskKind, UserKV, build_network
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import draw_weights, load_weights
from kvcast.protocol.config import ModelConfig, list_configs, load_config
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.golden import read_golden
from kvcast.protocol.manifest import hash_file, read_manifest
from kvcast.protocol.schema import FeatureSchema, Field
from kvcast.protocol.tensors import EXPORTED_MODELS, MODELS
from kvcast.synthetic.__main__ import main as clicklog
from kvcast.train.__main__ import main as train
from kvcast.train.trainer import (
    EMBEDDING_SCALE,
    Controls,
    Interrupted,
    RunFiles,
    Settings,
    Trainer,
    make_trainable,
)
from tests.support import EXPORTED_TOML, make_config, make_network
from tests.train_data import draw_parts
from tests.unit.differing import Plain

CONFIG = make_config()
FIRST_TWO = CONFIG.schema.candidate_fields[:2]


class KeepsState(Transformer):
    """Encoding depends on what was fused before."""

    calls = 0

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        self.calls += 1
        return super().fuse(user_kv, candidates)

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        return UserKV(tuple(key + 1e-7 * self.calls for key in keys), values)


class NormalisesOverCandidates(Transformer):
    """A score depends on the other candidates of the request."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        scores = super().fuse(user_kv, candidates)
        return scores - scores.mean(dim=1, keepdim=True)


class KnowsTheSlot(Transformer):
    """A score depends on where its candidate stands, but not on the others."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        scores = super().fuse(user_kv, candidates)
        return scores + 1e-3 * torch.arange(scores.shape[1])


class ScoresEverythingAlike(Transformer):
    """Every candidate gets the same score."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return 0 * super().fuse(user_kv, candidates)


class SeesPadding(Transformer):
    """Padding counts as events."""

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        length = history.shape[1]
        return UserKV(keys, tuple(value * (1 + 1e-3 * length) for value in values))


class FusesInexactly(Transformer):
    """The cached path differs from the monolith by more than rounding."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates) * 1.0001


class RanksOtherwise(Transformer):
    """One call after the other is right; both in one is not."""

    def rank(self, history: Tensor, candidates: Tensor, kept: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        scores, made = super().rank(history, candidates, kept, use_past)
        return scores * 1.0001, made


class ForgetsWhatWasKept(Transformer):
    """With kept KV, the scores are those of a user without history."""

    def rank(self, history: Tensor, candidates: Tensor, kept: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        return super().rank(history, candidates, kept, torch.zeros_like(use_past))


class WritesIntoWhatWasKept(Transformer):
    """Fusing changes the cached KV."""

    def rank(self, history: Tensor, candidates: Tensor, kept: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        result = super().rank(history, candidates, kept, use_past)
        kept.keys[0].mul_(1.001)
        return result


class ReturnsNaN(Transformer):
    """A score is not a number."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates) * torch.nan


class LooksAtCandidates(Transformer):
    """The mask that should be target-blind is not."""

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().run_monolith(history, candidates, "undirected")


class IsBlindToTheMask(Transformer):
    """The undirected mask does nothing, so that its absence proves nothing."""

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().run_monolith(history, candidates, "target_blind")


BROKEN = {
    KeepsState: "property 1",
    NormalisesOverCandidates: "property 2",
    KnowsTheSlot: "property 2",  # alone, every candidate stands in slot 0
    ScoresEverythingAlike: "property 4",
    SeesPadding: "property 5",
    FusesInexactly: "property 6",
    RanksOtherwise: "resident path = cached path (cold)",
    ForgetsWhatWasKept: "resident path = cached path (warm)",
    WritesIntoWhatWasKept: "fusing wrote into past KV",
    ReturnsNaN: "scores: expected finite",
    LooksAtCandidates: "property 6",
}


@pytest.mark.parametrize("family", BROKEN, ids=lambda family: family.__name__)
@torch.inference_mode()
def test_a_network_that_breaks_a_property_is_refused(family):
    network = family(CONFIG).eval()
    draw_weights(network, 0)
    with pytest.raises(ProofError) as caught:
        prove(TorchCalls(network), draw_sample(CONFIG.schema, 12, 5, seed=1), network.kv_layout)
    assert BROKEN[family] in str(caught.value)


@torch.inference_mode()
def test_a_network_whose_scores_depend_on_order_alone_is_refused():
    """A slot dependence that vanishes for N = 1 passes property 2 slot by slot only if it is also additive."""

    class ShufflesScores(Transformer):
        def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
            scores = super().fuse(user_kv, candidates)
            return scores.sort(dim=1).values if scores.shape[1] > 1 else scores

    network = ShufflesScores(CONFIG).eval()
    draw_weights(network, 0)
    with pytest.raises(ProofError, match=r"property [23]"):
        prove(TorchCalls(network), draw_sample(CONFIG.schema, 12, 5, seed=1), network.kv_layout)


@pytest.mark.parametrize(
    ("family", "words"), [(LooksAtCandidates, "property 1"), (IsBlindToTheMask, "negative control")]
)
@torch.inference_mode()
def test_the_negative_control_can_fail(family, words):
    network = family(CONFIG).eval()
    draw_weights(network, 0)
    sample = draw_sample(CONFIG.schema, 12, 5, seed=1)
    with pytest.raises(ProofError, match=words):
        prove_history_is_blind(TorchCalls(network).probe_user_keys, CONFIG.schema, sample)


@torch.inference_mode()
def test_a_right_network_passes_and_reports_its_error():
    network = make_network(CONFIG)
    sample = draw_sample(CONFIG.schema, 12, 5, seed=1)
    calls = TorchCalls(network)
    assert 0 <= prove(calls, sample, network.kv_layout) < 1e-5
    prove_history_is_blind(calls.probe_user_keys, CONFIG.schema, sample)


def test_a_refused_export_leaves_the_repository_as_it_was(tmp_path):
    config = dataclasses.replace(
        CONFIG, network=dataclasses.replace(CONFIG.network, family=f"{__name__}:FusesInexactly")
    )
    with pytest.raises(ProofError, match="property 6"):
        export_release(config, WeightsSource(), tmp_path / "repository", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["no.such.module:Class", "kvcast.networks.transformer:Nothing", "json:JSONDecoder"])
def test_an_invalid_family_is_rejected(family):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=family))
    with pytest.raises(ConfigError, match=r"network\.family"):
        build_network(config)


def test_the_fingerprint_changes_with_any_weight_and_with_the_configuration():
    network = make_network(CONFIG)
    fingerprint = fingerprint_release(network)
    assert fingerprint == fingerprint_release(make_network(CONFIG))
    assert fingerprint != fingerprint_release(make_network(CONFIG, seed=1))
    assert fingerprint == fingerprint_release(make_network(dataclasses.replace(CONFIG, name="other")))
    assert fingerprint == fingerprint_release(make_network(dataclasses.replace(CONFIG, weights=Path("a.safetensors"))))
    with torch.no_grad():
        next(iter(network.parameters())).view(-1)[-1] += 1e-6
    assert fingerprint != fingerprint_release(network)


def test_weights_survive_safetensors(tmp_path):
    network = make_network(CONFIG, seed=4)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = build_network(CONFIG)
    load_weights(loaded, tmp_path / "weights.safetensors")
    assert fingerprint_release(loaded) == fingerprint_release(network)


class TiesTables(Plain):
    """Two embeddings, one parameter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tables["attribute_2"].weight = self.tables["attribute_1"].weight


TIED_CONFIG = dataclasses.replace(
    make_config(layers=1, heads=1),
    network=dataclasses.replace(CONFIG.network, family=f"{__name__}:TiesTables", layers=1, heads=1),
    schema=FeatureSchema(
        CONFIG.schema.history_fields,
        (CONFIG.schema.candidate_fields[0], *(Field(f"attribute_{number}", 71) for number in (1, 2))),
    ),
)


def test_tied_weights_need_one_of_their_names_and_may_have_both(tmp_path):
    network, path = make_network(TIED_CONFIG), tmp_path / "weights.safetensors"
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    one, other = (f"tables.attribute_{number}.weight" for number in (1, 2))
    for left_out in ([], [one], [other]):
        save_file({name: weight for name, weight in weights.items() if name not in left_out}, path)
        loaded = build_network(TIED_CONFIG)
        load_weights(loaded, path)
        assert fingerprint_release(loaded) == fingerprint_release(network)
    save_file(weights | {other: weights[other] + 1}, path)
    with pytest.raises(ConfigError, match=rf"{other}: expected the numbers of {one}, as both are one parameter"):
        load_weights(build_network(TIED_CONFIG), path)
    save_file({name: weight for name, weight in weights.items() if name not in (one, other)}, path)
    with pytest.raises(ConfigError, match=rf"{one}: missing(.|\n)*{other}: missing"):
        load_weights(build_network(TIED_CONFIG), path)


def test_a_network_with_tied_weights_trains_resumes_and_exports(tmp_path):
    parts, out = draw_parts(TIED_CONFIG, 60), RunFiles(tmp_path / "w.safetensors")
    settings = Settings(steps=6, batch_size=8, evaluate_every=3)
    stops = iter([False, False, False, True])
    cpu, quiet = torch.device("cpu"), lambda _: None
    with pytest.raises(Interrupted):
        Trainer(TIED_CONFIG, settings, parts, out, cpu, Controls(say=quiet, should_stop=lambda: next(stops))).run()
    trainer = Trainer(TIED_CONFIG, settings, parts, out, cpu, Controls(say=quiet))
    assert trainer.resume()
    trainer.run()
    tables = trainer.network.tables
    assert tables["attribute_1"].weight is tables["attribute_2"].weight
    names = load_file(out.weights).keys()
    assert "tables.attribute_1.weight" in names
    assert "tables.attribute_2.weight" not in names
    manifest = export_release(TIED_CONFIG, WeightsSource(out.weights), tmp_path / "repository", say=quiet)
    loaded = build_network(TIED_CONFIG)
    load_weights(loaded, out.weights)
    assert manifest.release == fingerprint_release(loaded)
    scale = make_trainable(TIED_CONFIG, 0).tables["attribute_1"].weight.std().item()
    assert scale == pytest.approx(EMBEDDING_SCALE * 0.3, rel=0.2), "scaled once"


def test_vocabularies_of_two_ids_are_exported(tmp_path):
    """Known or not."""
    fields = FeatureSchema(*(tuple(Field(field.name, 2) for field in side) for side in (FIRST_TWO, FIRST_TWO)))
    network = dataclasses.replace(CONFIG.network, family="tests.unit.differing:Plain", layers=1, heads=1)
    config = dataclasses.replace(CONFIG, network=network, schema=fields)
    sample = draw_sample(fields, 12, 5, seed=1)
    assert sample.candidates[0].tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert export_release(config, WeightsSource(), tmp_path / "repository", say=lambda _: None).config == config.name


def test_one_field_of_two_ids_and_one_candidate_are_enough():
    fields = FeatureSchema((Field("item", 2),), (Field("item", 2),))
    network = make_network(dataclasses.replace(CONFIG, schema=fields))
    for count in (1, 5):
        sample = draw_sample(fields, 12, count, seed=1)
        assert sample.candidates[0, :, 0].tolist() == [1, 0][:count]
        with torch.inference_mode():
            prove(TorchCalls(network), sample, network.kv_layout)
            prove_history_is_blind(TorchCalls(network).probe_user_keys, fields, sample)


def test_weights_that_do_not_fit_are_listed_all_at_once(tmp_path):
    weights = make_network(CONFIG).state_dict()
    weights["extra"] = torch.zeros(1)
    weights["score.weight"] = torch.zeros(1, 3)
    weights["score.bias"] = torch.full((1,), torch.nan)
    weights["types.weight"] = weights["types.weight"].double()
    del weights["positions.weight"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_weights(build_network(CONFIG), tmp_path / "weights.safetensors")
    for words in (
        "extra: not a parameter of Transformer",
        "score.weight: expected torch.float32 [1, 16], got torch.float32 [1, 3]",
        "score.bias: expected finite numbers",
        "types.weight: expected torch.float32",
        "positions.weight: missing",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly_and_said(tmp_path, dtype):
    path, said = tmp_path / "weights.safetensors", []
    half = {name: weight.to(dtype) for name, weight in make_network(CONFIG, seed=4).state_dict().items()}
    save_file(half, path)
    loaded = build_network(CONFIG)
    load_weights(loaded, path, say=said.append)
    assert said == [f"weights {path}: {dtype}, widened to torch.float32, which changes no number"]
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.to(dtype), half[name])


@pytest.mark.parametrize("wrapper", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}"])
def test_names_of_a_wrapped_network_are_told_with_the_remedy(tmp_path, wrapper):
    weights = {wrapper.format(name): weight for name, weight in make_network(CONFIG).state_dict().items()}
    weights[wrapper.format("score.bias")] = torch.zeros(3)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_weights(build_network(CONFIG), tmp_path / "weights.safetensors")
    said = str(caught.value)
    for part in wrapper.split(".")[:-1]:
        assert f"{part}. (" in said
    assert "score.bias: expected torch.float32 [1], got torch.float32 [3]" in said
    assert "missing" not in said
    remedy = said[said.index("{'.'") : said.index("weights.items()}") + len("weights.items()}")]
    renamed = eval(remedy, {"weights": weights})  # noqa: S307 the line that users are told to run
    assert renamed.keys() == make_network(CONFIG).state_dict().keys()


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_an_invalid_weights_file_is_rejected(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load_weights(build_network(CONFIG), path)


def test_the_exported_repository(tiny_repository):
    manifests = [read_manifest(tiny_repository / model.name / "1") for model in EXPORTED_MODELS]
    assert len({manifest.release for manifest in manifests}) == 1
    assert len({manifest.kv_id for manifest in manifests}) == 1
    assert len(bytes.fromhex(manifests[0].kv_id)) == 32
    assert manifests[0].kv_id != manifests[0].release
    for model, manifest in zip(EXPORTED_MODELS, manifests, strict=True):
        folder = tiny_repository / model.name / "1"
        assert manifest.model == model.name
        assert set(manifest.files) == {"golden.json", "model.onnx", "weights.data"}
        assert all(hash_file(folder / name) == digest for name, digest in manifest.files.items())
        assert 0 < manifest.parity.onnx <= 1e-5
        assert 0 < manifest.parity.graphs <= 1e-5
        assert manifest.parity.undirected_difference > 1e-3
        assert b"/" + b"networks/transformer.py" not in (folder / "model.onnx").read_bytes(), "no path of this machine"
    assert {path.name for path in tiny_repository.iterdir()} == {model.name for model in MODELS}


@torch.inference_mode()
def test_the_golden_scores_are_those_of_the_network(tiny_repository):
    network = make_network(load_config(str(EXPORTED_TOML)), seed=0)
    for model in EXPORTED_MODELS:
        golden = read_golden(tiny_repository / model.name / "1")
        scores = network.fuse(
            network.encode_user(torch.from_numpy(golden.history)[None]), torch.from_numpy(golden.candidates)[None]
        )
        np.testing.assert_array_equal(golden.scores, scores[0].numpy())


def test_weights_are_those_asked_for_or_those_that_the_configuration_comes_with(tmp_path):
    config = dataclasses.replace(CONFIG, weights=tmp_path / "own.safetensors")
    for asked in (WeightsSource(tmp_path / "other.safetensors"), WeightsSource(seed=0)):
        assert _choose_weights(config, asked) == asked
    assert _choose_weights(CONFIG, WeightsSource()) == WeightsSource()
    with pytest.raises(
        ConfigError, match=r"own\.safetensors, which small comes with: there is no such file; train them"
    ):
        export_release(config, WeightsSource(), tmp_path / "repository", say=lambda _: None)
    config.weights.touch()
    assert _choose_weights(config, WeightsSource()).file == config.weights


def test_a_trained_model_is_exported_over_another_and_keeps_an_operators_configuration(
    own_repository, tmp_path, capsys
):
    """From a log to an export by the commands alone; the weights are written where the TOML expects them."""
    toml, log = tmp_path / "configs" / "own.toml", tmp_path / "log.csv"
    out = tmp_path / "weights" / "own.safetensors"
    for path in (toml, out):
        path.parent.mkdir()
    text = EXPORTED_TOML.read_text().replace('name = "tiny"', 'name = "own"\nweights = "../weights/own.safetensors"')
    toml.write_text(text.replace('family = "transformer"', 'family = "tests.unit.differing:Plain"'))
    assert clicklog(["--config", str(toml), "--log", str(log), "--users", "40", "--days", "5", "--seed", "2"]) == 0
    assert train(["--config", str(toml), "--log", str(log), "--out", str(out), "--steps", "4"]) == 0
    config = own_repository / "doc_fusion" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    capsys.readouterr()
    assert main(["--config", str(toml), "--repository", str(own_repository)]) == 0
    printed = capsys.readouterr().out
    assert f"weights: {out}" in printed
    assert re.search(r"^\[9\] write ", printed, re.MULTILINE)
    assert "cached = monolith" in printed
    assert "count: 2" in config.read_text()
    network = build_network(load_config(str(toml)))
    load_weights(network, out)
    assert read_manifest(own_repository / "doc_fusion" / "1").release == fingerprint_release(network)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nonsense"], f"expected one of {', '.join(list_configs())}"),
        (["--config", "tiny", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_the_command_line_reports_errors(tmp_path, capsys, arguments, words):
    assert main([*arguments, "--repository", str(tmp_path / "r")]) == 1
    assert words in capsys.readouterr().err


def test_samples_hold_no_padding_and_different_candidates():
    sample = draw_sample(CONFIG.schema, 50, 20, seed=3)
    assert (sample.history > 0).all()
    assert len(np.unique(sample.candidates[0, :, 0])) == 20

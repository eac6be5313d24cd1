"""A family of one's own: found by name or file, its options checked and fingerprinted, every broken property named."""

import dataclasses
import json
import math
import re
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvcast.export.calls import TorchCalls
from kvcast.export.graphs import TraceError
from kvcast.export.pipeline import Proofs, export_release
from kvcast.export.proofs import ProofError, Sample, draw_sample, prove
from kvcast.export.release import fingerprint_release
from kvcast.export.trace import trace_model
from kvcast.networks.hstu import HSTU
from kvcast.networks.interface import SHORT_NAMES, RankingNetwork, UserKV, build_network
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import WeightsSource, draw_weights, set_weights
from kvcast.protocol.config import ModelConfig, list_configs, load_config, parse_config
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.manifest import Dims, Manifest, Parity, parse_manifest
from kvcast.protocol.schema import KVLayout
from kvcast.protocol.tensors import DOC_FUSION, USER_ENCODER
from perf.baselines.softmax import choose_peers
from perf.cost_model import CostModel
from tests.e2e.test_bring_your_own import copy_files
from tests.support import make_config, make_network
from tests.unit import differing

ROOT = Path(__file__).parents[2]
CONFIG = make_config()
HSTU_CONFIG = load_config("tiny-hstu")


def with_network(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, network=dataclasses.replace(config.network, **changes))


# Families that break one property each.


class DropsOut(Transformer):
    """Dropout in the user's side that evaluation mode does not switch off."""

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        return UserKV(keys, tuple(nn.functional.dropout(value, 0.1, training=True) for value in values))


class DropsOutOfScores(Transformer):
    """The same on the item's side."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        values = tuple(nn.functional.dropout(value, 0.1, training=True) for value in user_kv.values)
        return super().fuse(UserKV(user_kv.keys, values), candidates)


class NormalisesTheBatch(Transformer):
    """Batch norm over the candidates, without running statistics."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        scores = super().fuse(user_kv, candidates)
        return nn.functional.batch_norm(scores.view(-1, 1), None, None, training=True).view(scores.shape)


class SharesOutScores(Transformer):
    """Softmax over the candidates."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates).softmax(dim=1)


class RanksCandidates(Transformer):
    """A score falls with every better candidate."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        scores = super().fuse(user_kv, candidates)
        return scores + 0.01 * (scores[:, :, None] < scores[:, None, :]).sum(dim=2)


class KnowsTheSlot(Transformer):
    """A position by slot in the request."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates) + 0.01 * torch.arange(candidates.shape[1])


class KnowsLateSlots(Transformer):
    """A fault behind the first few slots, as of a loop over chunks; the monolith is right."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates) + 0.01 * (torch.arange(candidates.shape[1]) >= 5)


class KnowsTheLastSlot(Transformer):
    """The same on both paths, in the last slot alone."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        return super().fuse(user_kv, candidates) + self._add(candidates)

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        scores, keys = super().run_monolith(history, candidates, mask)  # type: ignore[arg-type]
        return scores + self._add(candidates), keys

    def _add(self, candidates: Tensor) -> Tensor:
        return 0.01 * (torch.arange(candidates.shape[1]) == self.config.limits.candidates - 1)


class ForgetsOldEvents(Transformer):
    """The cached path leaves out what lies behind the longest history of the other proofs."""

    def encode_user(self, history: Tensor) -> UserKV:
        return super().encode_user(torch.where(torch.arange(history.shape[1])[:, None] < 20, history, 0))


class MasksWithInfinity(Transformer):
    """KV that the models would refuse wherever there is padding."""

    @property
    def kv_layout(self) -> KVLayout:
        return msgspec.structs.replace(super().kv_layout, mask_value=-math.inf)


class LikesDescendingOrder(Transformer):
    """Candidates together score as each alone, as long as the first has the larger id."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        is_ascending = candidates[:, :1, 0] < candidates[:, -1:, 0]
        return super().fuse(user_kv, candidates) + 0.01 * is_ascending


class ForgetsTheCandidate(Transformer):
    """Every candidate gets the mean of some."""

    def _embed_candidates(self, candidates: Tensor) -> Tensor:
        return super()._embed_candidates(torch.ones_like(candidates))


class CountsPaddingAsPlaces(Transformer):
    """Positions by column, padding included."""

    def _embed_history(self, history: Tensor, is_event: Tensor) -> Tensor:
        return super()._embed_history(history, torch.ones_like(is_event))


class AveragesOverPadding(HSTU):
    """Attention divided by the number of columns."""

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        return UserKV(keys, tuple(value / history.shape[1] for value in values))

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise AssertionError("padding comes first")


class TellsAnotherPadding(Transformer):
    """The layout's padding is an event to `fuse`."""

    @property
    def kv_layout(self) -> KVLayout:
        return msgspec.structs.replace(super().kv_layout, mask_value=0.0)


class TellsAnotherShape(Transformer):
    """The layout leaves a row out."""

    @property
    def kv_layout(self) -> KVLayout:
        return msgspec.structs.replace(super().kv_layout, key_rows=9)


class RoundsTheKV(Transformer):
    """A cached path in half precision."""

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        return UserKV(keys, tuple(value.half().float() for value in values))


class RefusesEmptyHistories(Transformer):
    """The monolith has an exception for new users that the cached path has not."""

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        scores, keys = super().run_monolith(history, candidates, mask)  # type: ignore[arg-type]
        return torch.where((history != 0).any(), scores, scores + 0.01), keys


class StumblesOverBatches(Transformer):
    """Works for one user at a time."""

    def encode_user(self, history: Tensor) -> UserKV:
        return super().encode_user(history.squeeze(0)[None])


BROKEN = {
    DropsOut: "property 1, user KV ignores candidates: encoding again",
    DropsOutOfScores: "property 2, N candidates together = each alone (the same call twice)",
    NormalisesTheBatch: "property 2, N candidates together = each alone: a call failed: ValueError",
    SharesOutScores: "property 2",
    RanksCandidates: "property 2",
    KnowsTheSlot: "property 2",
    KnowsLateSlots: "property 2, N candidates together = each alone (32 candidates, cached path): expected",
    KnowsTheLastSlot: "property 2, N candidates together = each alone (32 candidates, cached path): expected",
    ForgetsOldEvents: "property 6, cached path = monolith (64 events)",
    MasksWithInfinity: "kv_layout: expected a finite mask_value, got -inf",
    LikesDescendingOrder: "property 3, permuting candidates",
    ForgetsTheCandidate: "property 4, different candidates",
    CountsPaddingAsPlaces: "property 5, padding changes nothing (front)",
    AveragesOverPadding: "property 5, padding changes nothing",
    StumblesOverBatches: "property 5, padding changes nothing: a call failed",
    TellsAnotherPadding: "property 5, padding changes nothing (slots as kv_layout says: mask_row",
    RoundsTheKV: "property 6, cached path = monolith: expected scores equal",
    RefusesEmptyHistories: "property 6, cached path = monolith (empty history)",
    TellsAnotherShape: "kv_layout: expected 2 keys [B, 2, 9, 13]",
}


def prove_network(network: RankingNetwork, samples: list[Sample]) -> float:
    """Prove a network as an export does; return the largest difference of scores."""
    proofs = Proofs(network, samples)
    proofs.prove_network()
    proofs.prove_network_limits()
    return proofs.describe("").torch


@pytest.mark.parametrize("family", BROKEN, ids=lambda family: family.__name__)
@torch.inference_mode()
def test_a_family_that_breaks_one_property_is_refused_by_its_name(family):
    config = HSTU_CONFIG if issubclass(family, HSTU) else CONFIG
    network = family(config).eval()
    draw_weights(network, 0)
    sample = next(  # one whose permutation LikesDescendingOrder notices, and whose own order it does not
        sample
        for sample in (draw_sample(config.schema, 12, 5, seed) for seed in range(100))
        if sample.candidates[0, 0, 0] > sample.candidates[0, 4, 0]
        and sample.candidates[0, 2, 0] < sample.candidates[0, 1, 0]
    )
    with pytest.raises(ProofError) as caught:
        prove_network(network, [sample])
    assert str(caught.value).startswith(BROKEN[family])


class ChoosesInPython(Transformer):
    """An `if` that looks into a tensor."""

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        scores = super().fuse(user_kv, candidates)
        return scores if candidates[0, 0, 0] > 3 else scores * 1


@torch.inference_mode()
def test_code_that_cannot_be_traced_is_named_by_its_line(tmp_path, capfd):
    network = ChoosesInPython(CONFIG).eval().requires_grad_(False)
    draw_weights(network, 0)
    with pytest.raises(TraceError) as caught:
        trace_model(network, DOC_FUSION.name)
    said = str(caught.value)
    assert said.startswith("doc_fusion cannot be traced for any number of users, events and candidates: ")
    assert re.search(r"test_families\.py:\d+: return scores if candidates\[0, 0, 0\] > 3 else", said)
    assert len(said.splitlines()) <= 4
    assert capfd.readouterr() == ("", ""), "torch prints hundreds of lines"


ADVICE = "Sizes come from the tensors that are given"


@pytest.mark.parametrize(
    ("family", "words", "line", "is_advised"),
    [
        (
            differing.SearchesASortedList,
            "the operator aten.searchsorted.Tensor cannot be translated to ONNX: DispatchError: No ONNX function found",
            "return tokens + torch.searchsorted(",
            False,
        ),
        (
            differing.AttendsWithoutHeads,
            "aten.scaled_dot_product_attention.default cannot be translated to ONNX: AssertionError: only 4D query",
            "return attended + nn.functional.scaled_dot",
            False,
        ),
        (differing.RecursInPython, "static shape of 5 for dimension inputs['history'].shape[1]", "", True),
    ],
)
@torch.inference_mode()
def test_what_the_exporter_cannot_do_is_named_with_its_reason(family, words, line, is_advised):
    network = family(make_config(layers=1, heads=1)).eval().requires_grad_(False)
    draw_weights(network, 0)
    with pytest.raises(TraceError) as caught:
        trace_model(network, USER_ENCODER.name)
    said = str(caught.value)
    assert words in said
    assert re.search(rf"differing\.py:\d+: {re.escape(line)}" if line else "shape", said)
    assert (ADVICE in said) == is_advised


def test_a_recurrent_encoder_is_exported(tmp_path):
    """For histories of any length: the exporter keeps a GRU as one operator."""
    config = with_network(make_config(layers=1, heads=1), family="tests.unit.differing:Recurs")
    manifest = export_release(config, WeightsSource(), tmp_path / "repository", say=lambda _: None)
    assert manifest.parity.graphs <= 1e-5


@torch.inference_mode()
def test_both_families_pass():
    for config in (CONFIG, HSTU_CONFIG, with_network(HSTU_CONFIG, options={}), with_network(HSTU_CONFIG, layers=1)):
        network = make_network(config)
        sample = draw_sample(config.schema, 12, 5, seed=1)
        assert 0 <= prove(TorchCalls(network), sample, network.kv_layout) <= 1e-5
        prove_network(network, [sample])


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": "hour"}, "network.options: HSTU has no option 'times' (it has: time_field)"),
        ({"time_field": 3}, "network.options.time_field: expected str, got 3"),
        ({"time_field": True}, "network.options.time_field: expected str, got True"),
        ({"time_field": "day"}, "network.options.time_field: expected one of ['item', 'action', 'hour'], got 'day'"),
        ({"time_field": "item"}, "network.options.time_field: expected a field of events alone"),
    ],
)
def test_an_option_that_the_family_cannot_use_is_named(options, words):
    with pytest.raises(ConfigError) as caught:
        build_network(with_network(HSTU_CONFIG, options=options))
    assert words in str(caught.value)


def test_a_family_without_options_takes_none():
    with pytest.raises(ConfigError, match=r"Transformer has no option 'heat' \(it has: none\)"):
        build_network(with_network(CONFIG, options={"heat": 1.0}))


@pytest.mark.parametrize("value", [[1], {"a": 1}, float("nan")], ids=str)
def test_an_option_is_a_string_a_number_or_a_boolean(value):
    table = tomllib.loads((ROOT / "export" / "configs" / "tiny.toml").read_text())
    table["network"]["options"] = {"heat": value}
    with pytest.raises(ConfigError, match=r"network\.options\.heat: expected a string, a finite number or a boolean"):
        parse_config(table)
    table["network"]["options"] = 3
    with pytest.raises(ConfigError, match=r"network\.options: expected `object`"):
        parse_config(table)


def test_options_are_part_of_the_release():
    timed = make_network(HSTU_CONFIG)
    untimed = make_network(with_network(HSTU_CONFIG, options={"time_field": ""}))
    left_out = make_network(with_network(HSTU_CONFIG, options={}))
    assert len({fingerprint_release(network) for network in (timed, untimed, left_out)}) == 3


def test_options_travel_with_the_manifest():
    manifest = Manifest(
        model="ranker", config="c", network="f:F", release="0" * 64, kv_id="0" * 64,
        history_fields=CONFIG.schema.history_fields, candidate_fields=CONFIG.schema.candidate_fields,
        limits=CONFIG.limits, workload=CONFIG.workload, dims=Dims(1, 1, 1, 1),
        user_kv=make_network(CONFIG).kv_layout, dtype="FP32", opset=20, versions={}, parity=Parity(0, 0, 0, 0, ""),
        files={},
    )  # fmt: skip
    assert "network_options" not in json.loads(manifest.to_json())
    assert parse_manifest(manifest.to_json()) == manifest
    manifest = msgspec.structs.replace(manifest, network_options={"time_field": "hour", "heat": 0.5, "cold": False})
    assert parse_manifest(manifest.to_json()) == manifest


# Families from a file.


@pytest.fixture
def guide_folder(tmp_path: Path) -> Path:
    copy_files(tmp_path)
    return tmp_path


def test_imports_of_moved_modules_name_the_new_module(tmp_path):
    (tmp_path / "old.py").write_text("from kvcast.network.interface import RankingNetwork\n")
    for family, words in (("old.py:Old", "kvcast.networks now"), ("kvcast.contract.x:Y", "kvcast.protocol now")):
        with pytest.raises(ConfigError, match=words):
            build_network(with_network(CONFIG, family=family, folder=tmp_path))


def test_a_file_is_found_beside_its_toml_from_anywhere(guide_folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = load_config(str(guide_folder / "my.toml"))
    network = build_network(config)
    assert type(network) is type(build_network(config)), "a file is run once"
    draw_weights(network, 0)
    samples = [draw_sample(config.schema, 20, 5, seed=1)]
    with torch.inference_mode():
        assert prove_network(network, samples) <= 1e-5
    fingerprint = fingerprint_release(network)
    source = guide_folder / "my_network.py"
    moved = tmp_path_factory.mktemp("moved")
    (moved / source.name).write_text(source.read_text())
    (moved / "my.toml").write_text((guide_folder / "my.toml").read_text())
    copy = build_network(load_config(str(moved / "my.toml")))
    draw_weights(copy, 0)
    assert fingerprint_release(copy) == fingerprint, "the folder is no part of a release"
    (moved / "other.py").write_text(source.read_text() + "\n# changed\n")
    changed = build_network(with_network(config, family="other.py:ServedTaste", folder=moved))
    draw_weights(changed, 0)
    assert fingerprint_release(changed) != fingerprint, "the code is"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("divisor = 50", "divisr = 50"), "ServedTaste has no option 'divisr' (it has: divisor)"),
        (("divisor = 50", 'divisor = "many"'), "network.options.divisor: expected int, got 'many'"),
        (("my_network.py:ServedTaste", "other.py:ServedTaste"), "network.family: cannot import 'other.py:ServedTaste'"),
        (("my_network.py:ServedTaste", "my_network:ServedTaste"), "a file is named by its path: file.py:Class"),
        (("my_network.py:ServedTaste", "my_network.py:Taste"), "expected a subclass of RankingNetwork"),
        (("my_network.py:ServedTaste", "my_network.py:Tase"), "has no attribute 'Tase'"),
        (("my_network.py:ServedTaste", "my.toml:Taste"), "network.family: cannot import 'my.toml:Taste'"),
    ],
)
def test_typos_in_a_toml_are_reported(guide_folder, change, words):
    toml = guide_folder / "my.toml"
    toml.write_text(toml.read_text().replace(*change))
    with pytest.raises(ConfigError) as caught:
        build_network(load_config(str(toml)))
    assert words in str(caught.value)


def test_an_invalid_family_file_is_rejected(guide_folder):
    source = guide_folder / "my_network.py"
    source.write_text(source.read_text().replace("def fuse(", "def fuze("))
    with pytest.raises(ConfigError, match="lacks fuse of RankingNetwork"):
        build_network(load_config(str(guide_folder / "my.toml")))
    (guide_folder / "broken.py").write_text("class Half(")
    for _ in range(2):  # a file that failed is tried again
        with pytest.raises(ConfigError, match=r"cannot import 'broken\.py:Half'"):
            build_network(with_network(load_config(str(guide_folder / "my.toml")), family="broken.py:Half"))


def test_the_release_holds_the_code_of_bases_and_parts():
    """A subclass in a file of its own changes when the family that it builds on does."""
    network = DropsOut(CONFIG).requires_grad_(False)
    draw_weights(network, 0)
    before = fingerprint_release(network)
    text = (ROOT / "src" / Transformer.__module__.replace(".", "/")).with_suffix(".py").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kvcast.export.release.inspect.getsource",
            lambda each: text + "# changed" if each.__name__ == Transformer.__module__ else "same",
        )
        changed = fingerprint_release(network)
        patch.setattr("kvcast.export.release.inspect.getsource", lambda _: "same")
        assert len({before, changed, fingerprint_release(network)}) == 3


# Weights from elsewhere.


@pytest.mark.parametrize("mask", [None, "target_blind", "undirected", "causal"])
def test_weights_of_another_mask_are_taken_only_if_asked(tmp_path, mask):
    path, trained = tmp_path / "weights.safetensors", make_network(CONFIG, seed=3)
    save_file(trained.state_dict(), path, metadata=None if mask is None else {"kvcast.mask": mask})
    network = build_network(CONFIG)
    if mask == "causal":
        with pytest.raises(ConfigError, match=r"expected kvcast\.mask to be target_blind or undirected, got 'causal'"):
            set_weights(network, WeightsSource(path))
        return
    if mask == "undirected":
        with pytest.raises(ConfigError, match="--accept-undirected"):
            set_weights(network, WeightsSource(path))
    assert set_weights(network, WeightsSource(path, accept_undirected=True)) == mask
    assert fingerprint_release(network) == fingerprint_release(trained)


def test_mismatches_come_before_the_mask_and_all_at_once(tmp_path):
    weights = make_network(CONFIG).state_dict()
    weights["extra"] = torch.zeros(2, 3)
    del weights["positions.weight"]
    save_file(weights, tmp_path / "weights.safetensors", metadata={"kvcast.mask": "undirected"})
    with pytest.raises(ConfigError) as caught:
        set_weights(build_network(CONFIG), WeightsSource(tmp_path / "weights.safetensors"))
    assert "extra: not a parameter of Transformer, got torch.float32 [2, 3]" in str(caught.value)
    assert "positions.weight: missing, expected torch.float32 [64, 16]" in str(caught.value)


# What is measured of a family.


def test_the_cost_model_uses_the_networks_own_costs():
    hstu, transformer = (CostModel.of(load_config(name)) for name in ("hstu", "bench"))
    length, width = 1000, 256
    assert hstu.user_flops(trimmed=False) == pytest.approx(4 * length * (10 * width**2 + 4 * length * width), rel=1e-3)
    assert transformer.user_flops(trimmed=False) == pytest.approx(
        4 * length * (24 * width**2 + 4 * length * width), rel=1e-3
    )


def test_peers_that_cannot_run_a_network_are_left_out():
    names = ("shared", "ort_expanded", "torch_flash")
    for name in ("tiny", "bench", "seed"):
        assert choose_peers(load_config(name), names) == (list(names), [])
    for name in ("tiny-hstu", "hstu"):
        assert choose_peers(load_config(name), names) == (["shared"], ["ort_expanded", "torch_flash"])


def test_only_a_familys_own_files_name_it():
    """But for the TOMLs, which choose one by its short name, and the table of these."""
    assert {load_config(name).network.family for name in list_configs()} == set(SHORT_NAMES)
    families = {family.partition(":")[0] for family in SHORT_NAMES.values()}
    assert {"kvcast.networks.hstu", "kvcast.networks.transformer"} <= families
    names = {part for family in families for part in (family, family.rpartition(".")[2].upper())}
    paths = {path: path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    paths |= {path: path.relative_to(ROOT) for path in (ROOT / "perf").rglob("*.py")}
    for path, module in paths.items():
        text = path.read_text()
        if module == Path("kvcast/networks/interface.py"):
            for family in SHORT_NAMES.values():
                text = text.replace(f'"{family}",', "", 1)
        if ".".join(module.with_suffix("").parts) not in families:
            assert not {name for name in names if name in text or f"import {name.title()}" in text}, path


def test_every_family_is_a_network_of_the_interface():
    for name in list_configs():
        module, _, family = SHORT_NAMES[load_config(name).network.family].partition(":")
        assert issubclass(getattr(__import__(module, fromlist=[family]), family), RankingNetwork)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_short_name_is_its_class_and_its_release_stays_where_the_module_moves(name, tmp_path, monkeypatch):
    module, _, class_name = SHORT_NAMES[name].partition(":")
    assert type(make_network(with_network(CONFIG, family=name))) is getattr(sys.modules[module], class_name)
    release = fingerprint_release(make_network(with_network(CONFIG, family=name)))
    moved = tmp_path / "moved.py"
    moved.write_text((ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text())
    monkeypatch.setitem(SHORT_NAMES, name, f"{moved}:{class_name}")
    network = make_network(with_network(CONFIG, family=name))
    assert type(network).__module__ == str(moved)
    assert fingerprint_release(network) == release


def test_an_unknown_short_name_is_rejected_with_the_known_ones():
    expected = "expected transformer, hstu, 'package.module:Class' or 'file.py:Class', got 'hstv'"
    with pytest.raises(ConfigError, match=f"network.family: {expected}"):
        build_network(with_network(CONFIG, family="hstv"))

"""What `release` and `kv_id` depend on and what not; the scores that no change of code may move without a version."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kvcast.export import release
from kvcast.export.graphs import describe_graphs
from kvcast.export.release import fingerprint_release, hash_steps, list_tensors_read
from kvcast.export.template import GraphTemplate, list_weights
from kvcast.networks.interface import SHORT_NAMES, RankingNetwork, UserKV, build_network
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import draw_weights, load_weights
from kvcast.protocol.config import ModelConfig, load_config
from kvcast.protocol.schema import FeatureSchema, Field, Limits, Workload
from tests.support import TOLERANCE, make_config, make_network

ROOT = Path(__file__).parents[2]
CONFIG, HSTU_CONFIG = make_config(layers=1), load_config("tiny-hstu")  # one layer is traced in a second
HISTORY_FIELDS, CANDIDATE_FIELDS = CONFIG.schema.history_fields, CONFIG.schema.candidate_fields

# What makes another model of it, by the side that it concerns; and what is only said of it.
OF_USERS = {
    "layers": {"network": dataclasses.replace(CONFIG.network, layers=2)},
    "heads": {"network": dataclasses.replace(CONFIG.network, heads=4)},
    "history's vocabulary": {
        "schema": FeatureSchema((HISTORY_FIELDS[0], Field("event_1", 99)), CANDIDATE_FIELDS),
    },
    "history's field": {"schema": FeatureSchema((HISTORY_FIELDS[0], Field("e", 65)), CANDIDATE_FIELDS)},
    "limits.history": {"limits": Limits(history=65, candidates=32)},
}
OF_CANDIDATES = {
    "candidate's vocabulary": {
        "schema": FeatureSchema(HISTORY_FIELDS, (*CANDIDATE_FIELDS[:-1], Field("attribute_3", 99))),
    },
    "candidate's fields": {"schema": FeatureSchema(HISTORY_FIELDS, CANDIDATE_FIELDS[:-1])},
}
OF_NOTHING = {
    "name": {"name": "other"},
    "workload": {"workload": Workload(history=3, candidates=2)},
    "limits.candidates": {"limits": Limits(history=64, candidates=7)},
    "file of weights": {"weights": Path("a.safetensors")},
}


def make(config: ModelConfig = CONFIG, family: type[RankingNetwork] | None = None) -> RankingNetwork:
    """Return a network whose weights are the same for every configuration, as far as their shapes are."""
    network = build_network(config) if family is None else family(config).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    return network


@torch.inference_mode()
def trace(network: RankingNetwork) -> torch.export.ExportedProgram:
    graph = describe_graphs(network)[0]
    sizes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)  # users, L
    return torch.export.export(graph.module, graph.sample, dynamic_shapes=(sizes,), strict=False)


def fingerprint_kv(network: RankingNetwork, program: torch.export.ExportedProgram) -> str:
    reads = tuple(list_tensors_read(program).keys() & list_weights(network).keys())
    return release.fingerprint_kv(network, GraphTemplate("", b"", b"", (), (), hash_steps(program), reads))


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    """The trace of `make()`, where what changes is not to be found in a trace."""
    return trace(make())


@pytest.fixture(scope="module")
def known(program) -> tuple[str, str]:
    return fingerprint_release(make()), fingerprint_kv(make(), program)


@pytest.mark.parametrize("what", OF_USERS)
def test_what_the_users_side_depends_on_changes_both(known, program, what):
    network = make(dataclasses.replace(CONFIG, **OF_USERS[what]))
    assert fingerprint_release(network) != known[0]
    assert fingerprint_kv(network, program) != known[1]


@pytest.mark.parametrize("what", OF_CANDIDATES)
def test_what_only_scoring_depends_on_changes_the_release_alone(known, what):
    network = make(dataclasses.replace(CONFIG, **OF_CANDIDATES[what]))
    assert fingerprint_release(network) != known[0]
    assert fingerprint_kv(network, trace(network)) == known[1]


@pytest.mark.parametrize("what", OF_NOTHING)
def test_what_is_only_said_of_a_model_changes_nothing(known, what):
    network = make(dataclasses.replace(CONFIG, **OF_NOTHING[what]))
    assert (fingerprint_release(network), fingerprint_kv(network, trace(network))) == known


def test_options_change_both(program):
    by_hour, by_action = (
        make(dataclasses.replace(HSTU_CONFIG, network=dataclasses.replace(HSTU_CONFIG.network, options=each)))
        for each in ({"time_field": "hour"}, {"time_field": "action"})
    )
    assert fingerprint_release(by_hour) != fingerprint_release(by_action)
    assert fingerprint_kv(by_hour, program) != fingerprint_kv(by_action, program)


def test_the_contracts_version_changes_both(known, program, monkeypatch):
    monkeypatch.setattr("kvcast.export.release.CONTRACT_VERSION", 99)
    assert fingerprint_release(make()) != known[0]
    assert fingerprint_kv(make(), program) != known[1]


@pytest.mark.parametrize("config", [make_config(), HSTU_CONFIG], ids=["transformer", "hstu"])
def test_every_weight_changes_the_release_and_kv_id_goes_by_those_that_change_kv(config):
    network = make_network(config)
    history = torch.arange(2 * 9 * len(config.schema.history_fields)).view(2, 9, -1) % 60 + 1
    program = trace(network)
    before, kv_before = (fingerprint_release(network), fingerprint_kv(network, program)), network.encode_user(history)
    changing = set()
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        kept = weight.clone()
        weight.copy_(
            weight.flip(0) if weight.dtype == torch.uint8 else weight + torch.linspace(0.1, 1, weight.shape[-1])
        )
        made, kv_id = network.encode_user(history), fingerprint_kv(network, program)
        changes_kv = any(not torch.equal(*pair) for pair in zip(sum(kv_before, ()), sum(made, ()), strict=True))
        changing |= {name} if changes_kv else set()
        assert fingerprint_release(network) != before[0], name
        assert (kv_id != before[1]) == changes_kv, name
        weight.copy_(kept)
    assert (fingerprint_release(network), fingerprint_kv(network, program)) == before
    assert {name.removeprefix("network.") for name in list_tensors_read(program)} == changing
    assert {"score.weight", "types.weight"} < {name for name, _ in network.named_parameters()} - changing


# The code.


class Declared(Transformer):
    """A family that builds on one of ours, and says so itself."""

    version = 1


class Undeclared(Transformer):
    """One that only inherits a version."""


class LooksAtCandidates(Transformer):
    """Its user KV depends on what no weight shows."""

    version = 1

    def encode_user(self, history: Tensor) -> UserKV:
        keys, values = super().encode_user(history)
        return UserKV(keys, tuple(value * len(self.config.schema.candidate_fields) for value in values))


@pytest.fixture
def hash_both(program):
    """Hash a network by a trace that is none of its own: what is looked at here is the code."""
    return lambda network: {fingerprint_release(network), fingerprint_kv(network, program)}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_comment_in_a_family_of_ours_changes_nothing_and_its_version_changes_both(
    name, hash_both, tmp_path, monkeypatch
):
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, family=name))
    known = hash_both(make(config))
    module, _, class_name = SHORT_NAMES[name].partition(":")
    text = (ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text()
    changed = {"comment": text + "\n# changed\n", "raised": text.replace("    version = 1\n", "    version = 2\n")}
    assert text.count("    version = 1\n") == 1
    for file, new in changed.items():
        (tmp_path / f"{file}.py").write_text(new)
    monkeypatch.setitem(SHORT_NAMES, name, f"{tmp_path / 'comment.py'}:{class_name}")
    assert hash_both(make(config)) == known
    monkeypatch.setitem(SHORT_NAMES, name, f"{tmp_path / 'raised.py'}:{class_name}")
    assert not hash_both(make(config)) & known


def test_no_text_counts_where_all_declare_a_version_and_every_text_where_one_does_not(hash_both, monkeypatch):
    declared, undeclared = (hash_both(make(family=family)) for family in (Declared, Undeclared))
    monkeypatch.setattr("kvcast.export.release.inspect.getsource", lambda module: f"other text of {module}")
    assert hash_both(make(family=Declared)) == declared
    assert not hash_both(make(family=Undeclared)) & undeclared


def test_a_base_that_raises_its_version_changes_those_that_build_on_it(hash_both, monkeypatch):
    declared = hash_both(make(family=Declared))
    monkeypatch.setattr(Transformer, "version", 2)
    assert not hash_both(make(family=Declared)) & declared


def test_user_kv_that_depends_on_anything_else_of_the_configuration_is_never_mixed():
    fewer = dataclasses.replace(CONFIG, **OF_CANDIDATES["candidate's fields"])
    networks = [make(config, LooksAtCandidates) for config in (CONFIG, fewer)]
    assert len({fingerprint_kv(network, trace(network)) for network in networks}) == 2


# The scores that weights gave when a version was declared. Who changes what a network computes raises the `version` of
# its family and writes the new scores here; who changes none of it finds these.
GOLDEN = {
    "demo": (1, [-0.4213529, -1.0064312, 0.4310552, -0.5426884, 0.5858911]),
    "tiny-hstu": (1, [-0.8443317, 0.0257703, -0.9709619, -1.4150759, -1.2515627]),
}


@torch.inference_mode()
def rank_golden(name: str) -> tuple[RankingNetwork, list[np.ndarray]]:
    """Score a fixed request by every call: with the weights that the configuration comes with, or of seed 0."""
    config = load_config(name)
    network = build_network(config)
    if config.weights is None:
        draw_weights(network, 0)
    else:
        load_weights(network, config.weights)
    history, candidates = (
        torch.tensor([[[1 + (31 * row + 7 * column + row * row) % (field.vocab_size - 1)
                        for column, field in enumerate(fields)] for row in range(rows)]])
        for fields, rows in ((config.schema.history_fields, 24), (config.schema.candidate_fields, 5))
    )  # fmt: skip
    user_kv = network.encode_user(history)
    resident, _ = network.rank(history, candidates, user_kv, torch.tensor(False))
    scores = [network.fuse(user_kv, candidates), resident, network(history, candidates)]
    return network, [each[0].numpy() for each in scores]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_scores_of_the_declared_version(name):
    version, expected = GOLDEN[name]
    network, scores = rank_golden(name)
    assert network.version == version, "write the scores of the new version into GOLDEN"
    for each in scores:
        np.testing.assert_allclose(
            each, expected, rtol=0, atol=TOLERANCE, err_msg="the code computes something else: raise `version`"
        )


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("demo", "gelu", lambda gelu: lambda rows: gelu(rows, approximate="tanh")),
        ("demo", "layer_norm", lambda norm: lambda rows, *rest: norm(rows, *rest[:-1], 1e-3)),
        ("tiny-hstu", "silu", lambda silu: lambda rows: silu(rows) * (1 + 1e-4)),
    ],
)
def test_the_golden_scores_notice_a_small_change_of_code(name, part, change, monkeypatch):
    monkeypatch.setattr(nn.functional, part, change(getattr(nn.functional, part)))
    for each in rank_golden(name)[1]:
        assert np.abs(each - GOLDEN[name][1]).max() > TOLERANCE

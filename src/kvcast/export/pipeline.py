"""The whole export: build, prove in torch, trace, prove through ONNX, describe, and only then move into place.

Everything is made in a folder beside the repository and moved file by file, the manifest last: a reader sees the
old artefact, or a new one whose checksums hold, or a mismatch that it refuses. Never a half-written one it trusts.
"""

import contextlib
import dataclasses
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from kvcast.export.cache import Entry, LimitProofs, NoKeyError, TraceCache, make_key
from kvcast.export.calls import TorchCalls
from kvcast.export.equality import Graphs, prove_graphs_equal_network, prove_graphs_equal_network_at_limits
from kvcast.export.graphs import OPSET
from kvcast.export.proofs import (
    ProofError,
    Sample,
    draw_sample,
    prove,
    prove_history_is_blind,
    prove_layout,
    prove_limits,
)
from kvcast.export.release import fingerprint_kv, fingerprint_release
from kvcast.export.template import GraphTemplate, write_graphs
from kvcast.export.trace import trace_model, trace_network
from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.networks.weights import WeightsSource, set_weights
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.golden import GOLDEN_FILE, Golden
from kvcast.protocol.locate import is_in_wheel, locate
from kvcast.protocol.manifest import MANIFEST_FILE, RELEASES_FILE, Dims, Manifest, Parity, hash_file
from kvcast.protocol.tensors import EXPORTED_MODELS, USER_ENCODER

VERSION_FOLDER = "1"
# Long enough for every code path; properties 1 to 6 run some twenty forwards each.
PROOF_HISTORY = 192
PROOF_CANDIDATES = 5


class Progress:
    """Counts the steps and says how long each took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._step = 0

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce one step and, when it ends, its duration."""
        self._step += 1
        label = f"[{self._step}] {what}"
        self.say(f"{label} …")
        started = time.perf_counter()
        yield
        self.say(f"{label}: {time.perf_counter() - started:.1f} s")


@torch.inference_mode()
def export_release(
    config: ModelConfig,
    weights: WeightsSource,
    repository: Path,
    say: Callable[[str], None] = print,
    cache: TraceCache | None = None,
) -> Manifest:
    """Export a configuration into a model repository.

    Args:
        config: what to build.
        weights: a safetensors file, a seed, or what the configuration comes with.
        repository: the folder that Triton will load; made and furnished with the models if need be.
        say: receives lines of progress.
        cache: of traced graphs. With those of an earlier export of the same code and configuration only the weights
            are new: the same files, in a fraction of the time.

    Returns:
        The manifest (of the last model; they differ in `model` and `files` alone).

    Raises:
        ConfigError: the weights do not fit the configuration, or the repository holds published releases.
        TraceError: the network's code cannot be made into a graph.
        ProofError: a property does not hold; nothing in the repository has changed then.
    """
    if (repository / RELEASES_FILE).exists():
        raise ConfigError(
            f"{repository} holds published releases, which are never overwritten: "
            "export into another folder, and `kvcast release publish` that"
        )
    weights = _choose_weights(config, weights)
    if config.weights is not None and weights.file is None and weights.seed is None:
        say(f"the trained weights of {config.name} come with the checkout, not with the installed package")
    say(f"weights: {weights.file or f'random, of seed {weights.seed or 0}'}")
    progress = Progress(say)
    with progress.step(f"build {config.name} ({config.network.family})"):
        network, written = build_network(config), _stamp(weights)
        mask = set_weights(network, weights, say)
    with progress.step("fingerprint the release"):
        release = fingerprint_release(network)
    proofs = Proofs(network)
    with progress.step("prove the network (torch): properties 1 to 6, negative control"):
        proofs.prove_network()
    with _stage_beside(repository) as staging:
        trace = partial(_trace_beside_each_other, config, weights, written, progress)
        graphs, limits = _make_graphs(proofs, release, staging, progress, trace, cache)
        parity = proofs.describe(limits.release)
        kv_id = fingerprint_kv(network, graphs.templates[USER_ENCODER.name])
        with progress.step(f"write {repository}"):
            describe = partial(_describe, network, release, kv_id, parity)
            manifest = _write_repository(repository, graphs.folder, proofs.record_golden(), describe)
    say(
        f"release {release[:12]} of {config.name}: graphs = network to {parity.graphs:.1e}, cached = monolith to "
        f"{parity.torch:.1e} (torch) and {parity.onnx:.1e} (ONNX); the undirected mask would move scores by up to "
        f"{parity.undirected_difference:.1e}"
    )
    if mask == "undirected":
        say("these weights were trained with the undirected mask: so far can a score lie from the one of training")
    return manifest


def _choose_weights(config: ModelConfig, weights: WeightsSource) -> WeightsSource:
    """Return the weights that are meant: where nothing was asked for, the file that the configuration comes with."""
    own = config.weights
    if own is None or weights.file is not None or weights.seed is not None:
        return weights
    if not own.exists() and is_in_wheel(own):
        return weights
    if not own.exists():
        raise ConfigError(
            f"weights {own}, which {config.name} comes with: there is no such file; train them "
            f"(kvcast train --config … --log … --out {own}), or export others (--weights FILE, --seed 0)"
        )
    return dataclasses.replace(weights, file=own)


class Proofs:
    """The proofs of one export, and what they have measured so far."""

    def __init__(self, network: RankingNetwork, samples: list[Sample] | None = None) -> None:
        """Take the requests on which the properties are proved; two are drawn if there are none."""
        self.network, self._calls = network, TorchCalls(network)
        schema, limits = network.config.schema, network.config.limits
        length = min(PROOF_HISTORY, limits.history - 3)  # the padding proof adds three events
        count = min(PROOF_CANDIDATES, limits.candidates)
        drawn = [draw_sample(schema, length, count, seed=1), draw_sample(schema, 3, count, seed=2)]
        self._samples = samples or drawn
        self._errors = {"graphs": 0.0, "torch": 0.0, "onnx": 0.0, "undirected_difference": 0.0}
        self._seconds = 0.0

    def prove_network(self) -> None:
        """Prove properties 1 to 6 of the network in torch, run the negative control and measure the mask's effect."""
        calls, network = self._calls, self.network
        with self._timing():
            for sample in self._samples:
                prove_layout(calls.encode_user(sample.history), sample, network.kv_layout)
            self._record("torch", *(prove(calls, sample, network.kv_layout) for sample in self._samples))
            for sample in self._samples:
                prove_history_is_blind(calls.probe_user_keys, network.config.schema, sample)
                blind = calls.run_monolith(sample.history, sample.candidates)
                undirected = calls.run_monolith(sample.history, sample.candidates, "undirected")
                self._record("undirected_difference", abs(blind - undirected).max())

    def prove_equality(self, graphs: Graphs, *, are_known: bool) -> None:
        """Prove property 0 of the exported files; are_known: the graphs were proved before, with other weights."""
        with self._timing():
            self._record("graphs", prove_graphs_equal_network(self.network, graphs, are_known=are_known))

    def prove_graphs(self, graphs: Graphs) -> None:
        """Prove properties 1 to 6 of the exported files."""
        with self._timing():
            calls = graphs.open_files()
            self._record("onnx", *(prove(calls, sample, self.network.kv_layout) for sample in self._samples))

    def prove_network_limits(self) -> None:
        """Prove requests at the limits of the network in torch."""
        self._record("torch", prove_limits(self._calls, self.network.config, self.network.kv_layout))

    def prove_limits(self, graphs: Graphs, release: str) -> LimitProofs:
        """Prove requests at the limits, of the network and of the exported files; return what is known of that."""
        network, started = self.network, time.perf_counter()
        self.prove_network_limits()
        self._record("graphs", prove_graphs_equal_network_at_limits(network, graphs))
        self._record("onnx", prove_limits(graphs.open_files(), network.config, network.kv_layout))
        return LimitProofs(release, time.perf_counter() - started, self._seconds)

    def record_golden(self) -> Golden:
        """Return a request and the network's scores."""
        history, candidates = self._samples[0].history, self._samples[0].candidates
        return Golden(history[0], candidates[0], self._calls.rank(history, candidates)[0])

    def describe(self, limits: str) -> Parity:
        """Return what was measured; limits: the release with which requests at the limits were proved."""
        return Parity(**self._errors, limits=limits)

    def _record(self, name: str, *differences: float) -> None:
        self._errors[name] = float(max(self._errors[name], *differences))

    @contextlib.contextmanager
    def _timing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started


def _make_graphs(
    proofs: Proofs,
    release: str,
    staging: Path,
    progress: Progress,
    trace: Callable[[], tuple[GraphTemplate, ...]],
    cache: TraceCache | None,
) -> tuple[Graphs, LimitProofs]:
    """Write the graphs and prove them; those of the cache if it has them, and others where those cannot be proved."""
    key = _make_key(proofs.network, cache, progress)
    entry = cache.load(key) if cache and key else None
    try:
        templates = entry.templates if entry else trace()
        graphs = _write_and_prove(proofs, templates, release, staging / "graphs", progress, are_known=bool(entry))
    except ProofError as error:
        if entry is None:
            raise
        progress.say(f"{error}\nthat was a graph that had been traced before: all are traced again")
        entry = None
        graphs = _write_and_prove(proofs, trace(), release, staging / "again", progress, are_known=False)
    limits = entry.limits if entry else None
    if limits is not None and limits.seconds > limits.other_seconds:
        progress.say(f"requests at the limits were proved of these graphs with release {limits.release[:12]}")
    else:
        with progress.step("prove requests at the limits, in torch and through the ONNX graphs"):
            limits = proofs.prove_limits(graphs, release)
    # A module that was loaded meanwhile could have a part in the trace, and is not in the key.
    if cache and entry is None and key == _make_key(proofs.network, cache, progress):
        cache.store(key, Entry(tuple(graphs.templates.values()), limits))
    return graphs, limits


def _write_and_prove(
    proofs: Proofs,
    templates: tuple[GraphTemplate, ...],
    release: str,
    folder: Path,
    progress: Progress,
    *,
    are_known: bool,
) -> Graphs:
    with progress.step("put the weights into the graphs"):
        folder.mkdir()
        write_graphs(templates, proofs.network, release, folder)
    graphs = Graphs({each.model: each for each in templates}, folder, partial(trace_model, proofs.network))
    with progress.step("prove that the graphs equal the network (property 0)"):
        proofs.prove_equality(graphs, are_known=are_known)
    with progress.step("prove the ONNX graphs: properties 1 to 6"):
        proofs.prove_graphs(graphs)
    return graphs


def _trace_beside_each_other(
    config: ModelConfig, weights: WeightsSource, written: object, progress: Progress
) -> tuple[GraphTemplate, ...]:
    with progress.step("trace the four graphs, which takes longest"):
        traced = trace_network(config, weights, lambda model: progress.say(f"    {model} is traced"))
    if _stamp(weights) != written:  # the processes that trace have read the file again
        raise ConfigError(f"weights {weights.file}: they were written again during the export: export again")
    return tuple(traced.values())


def _stamp(weights: WeightsSource) -> object:
    """Return what changes when the file of weights is written."""
    if weights.file is None or not weights.file.exists():
        return None
    found = weights.file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _make_key(network: RankingNetwork, cache: TraceCache | None, progress: Progress) -> str:
    """Return the key of the network's graphs; empty without a cache, and where what they depend on cannot be told."""
    if cache is None:
        return ""
    try:
        return make_key(network)
    except NoKeyError as error:
        progress.say(f"the traced graphs cannot be used again: {error}")
        return ""


def _write_repository(
    repository: Path, made: Path, golden: Golden, describe: Callable[[str, Path], Manifest]
) -> Manifest:
    """Describe each model's files, and move them into the repository; return the last manifest."""
    _furnish_repository(repository)
    for model in EXPORTED_MODELS:
        (made / model.name / GOLDEN_FILE).write_text(golden.to_json())
        manifest = describe(model.name, made / model.name)
        (made / model.name / MANIFEST_FILE).write_text(manifest.to_json())
    for model in EXPORTED_MODELS:
        _move_into_place(made / model.name, repository / model.name / VERSION_FOLDER)
    return manifest


def _describe(network: RankingNetwork, release: str, kv_id: str, parity: Parity, model: str, folder: Path) -> Manifest:
    config = network.config
    return Manifest(
        model=model,
        config=config.name,
        network=config.network.family,
        release=release,
        kv_id=kv_id,
        history_fields=config.schema.history_fields,
        candidate_fields=config.schema.candidate_fields,
        limits=config.limits,
        workload=config.workload,
        dims=Dims(
            layers=config.network.layers,
            heads=config.network.heads,
            width=config.network.width,
            candidate_tokens=len(config.schema.candidate_fields),
        ),
        user_kv=network.kv_layout,
        dtype="FP32",
        opset=OPSET,
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("kvcast", "torch", "onnx", "onnxscript", "onnxruntime")},
        parity=parity,
        files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
        network_options=config.network.options,
    )


@contextlib.contextmanager
def _stage_beside(repository: Path) -> Iterator[Path]:
    """Make a folder on the repository's file system but outside it, where Triton takes every folder for a model."""
    repository.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".kvcast-export-") as folder:
        yield Path(folder)


def _furnish_repository(repository: Path) -> None:
    """Put in the adapters, and the configurations that are missing; an operator's own config.pbtxt is kept."""
    source = locate("model_repository")
    if source.resolve() == repository.resolve():
        return
    for config in sorted(source.glob("*/config.pbtxt")):
        model = repository / config.parent.name
        (model / VERSION_FOLDER).mkdir(parents=True, exist_ok=True)
        if not (model / config.name).exists():
            shutil.copyfile(config, model / config.name)
        for adapter in config.parent.glob(f"{VERSION_FOLDER}/*.py"):
            shutil.copyfile(adapter, model / VERSION_FOLDER / adapter.name)


def _move_into_place(staged: Path, target: Path) -> None:
    """Move the artefact's files, the manifest (which holds the others' checksums) last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        path.replace(target / path.name)

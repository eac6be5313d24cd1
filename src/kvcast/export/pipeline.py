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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from kvcast.export.calls import OnnxCalls, TorchCalls
from kvcast.export.equality import prove_graphs_equal_network
from kvcast.export.graphs import OPSET, describe_graphs, export_graph
from kvcast.export.proofs import Calls, Sample, draw_sample, prove, prove_history_is_blind, prove_layout, prove_limits
from kvcast.export.release import fingerprint_kv, fingerprint_release
from kvcast.networks.interface import MaskKind, RankingNetwork, build_network
from kvcast.networks.weights import draw_weights, load_weights
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.golden import GOLDEN_FILE, Golden
from kvcast.protocol.locate import is_in_wheel, locate
from kvcast.protocol.manifest import MANIFEST_FILE, ONNX_FILE, RELEASES_FILE, Dims, Manifest, Parity, hash_file
from kvcast.protocol.tensors import EXPORTED_MODELS, USER_ENCODER

VERSION_FOLDER = "1"
# Long enough for every code path; properties 1 to 6 run some twenty forwards each.
PROOF_HISTORY = 192
PROOF_CANDIDATES = 5
STEPS = 10


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from: a safetensors file or a seed; without either, what the configuration comes with.

    accept_undirected: take a file that says it was trained with the undirected mask.
    """

    file: Path | None = None
    seed: int | None = None
    accept_undirected: bool = False


class Progress:
    """Counts the steps and says how long each took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._step = 0

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce one step and, when it ends, its duration."""
        self._step += 1
        label = f"[{self._step}/{STEPS}] {what}"
        self._say(f"{label} …")
        started = time.perf_counter()
        yield
        self._say(f"{label}: {time.perf_counter() - started:.1f} s")


@torch.inference_mode()
def export_release(
    config: ModelConfig, weights: WeightsSource, repository: Path, say: Callable[[str], None] = print
) -> Manifest:
    """Export a configuration into a model repository.

    Args:
        config: what to build.
        weights: a safetensors file, a seed, or what the configuration comes with.
        repository: the folder that Triton will load; made and furnished with the models if need be.
        say: receives lines of progress.

    Returns:
        The manifest (of the last model; they differ in `model` and `files` alone).

    Raises:
        ConfigError: the weights do not fit the configuration, or the repository holds published releases.
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
        network = build_network(config)
        mask = _set_weights(network, weights, say)
    with progress.step("fingerprint the release"):
        release = fingerprint_release(network)
    with progress.step("prove the network (torch): properties 1 to 6, negative control"):
        samples = _draw_samples(config)
        torch_error, undirected_difference = _prove_network(network, samples)
    with contextlib.ExitStack() as stack:
        staging = Path(stack.enter_context(_stage_beside(repository)))
        traced = {}
        for graph in describe_graphs(network):
            with progress.step(f"trace {graph.model}"):
                folder = staging / graph.model
                folder.mkdir()
                traced[graph.model] = export_graph(graph, release, folder / ONNX_FILE)
        kv_id = fingerprint_kv(network, traced[USER_ENCODER.name].program)
        with progress.step("prove that the graphs equal the network (property 0)"):
            graph_error = prove_graphs_equal_network(network, traced)
        with progress.step("prove the ONNX graphs: properties 1 to 6"):
            onnx_error = _prove_calls(OnnxCalls.open(staging), samples, network)
            golden = _record_golden(TorchCalls(network), samples[0])
        parity = Parity(graph_error, torch_error, onnx_error, undirected_difference)
        with progress.step(f"write {repository}"):
            _furnish_repository(repository)
            for model in EXPORTED_MODELS:
                (staging / model.name / GOLDEN_FILE).write_text(golden.to_json())
                manifest = _describe(network, release, kv_id, parity, model.name, staging / model.name)
                (staging / model.name / MANIFEST_FILE).write_text(manifest.to_json())
                _move_into_place(staging / model.name, repository / model.name / VERSION_FOLDER)
    say(
        f"release {release[:12]} of {config.name}: graphs = network to {graph_error:.1e}, cached = monolith to "
        f"{torch_error:.1e} (torch) and {onnx_error:.1e} (ONNX); the undirected mask would move scores by up to "
        f"{undirected_difference:.1e}"
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


def _set_weights(
    network: RankingNetwork, weights: WeightsSource, say: Callable[[str], None] = print
) -> MaskKind | None:
    """Set every parameter; return the mask of training, where a file says it."""
    if weights.file is not None:
        return load_weights(network, weights.file, accept_undirected=weights.accept_undirected, say=say)
    draw_weights(network, weights.seed or 0)
    return None


def _draw_samples(config: ModelConfig) -> list[Sample]:
    length = min(PROOF_HISTORY, config.limits.history - 3)  # the padding proof adds three events
    count = min(PROOF_CANDIDATES, config.limits.candidates)
    return [draw_sample(config.schema, length, count, seed=1), draw_sample(config.schema, 3, count, seed=2)]


def _prove_calls(calls: Calls, samples: list[Sample], network: RankingNetwork) -> float:
    layout = network.kv_layout
    return max(*(prove(calls, sample, layout) for sample in samples), prove_limits(calls, network.config, layout))


def _record_golden(calls: Calls, sample: Sample) -> Golden:
    return Golden(sample.history[0], sample.candidates[0], calls.rank(sample.history, sample.candidates)[0])


def _prove_network(network: RankingNetwork, samples: list[Sample]) -> tuple[float, float]:
    """Return the parity error, and how far the undirected mask moves the scores."""
    calls = TorchCalls(network)
    for sample in samples:
        prove_layout(calls.encode_user(sample.history), sample, network.kv_layout)
    error = _prove_calls(calls, samples, network)
    for sample in samples:
        prove_history_is_blind(calls.probe_user_keys, network.config.schema, sample)
    differences = [
        abs(
            calls.run_monolith(sample.history, sample.candidates)
            - calls.run_monolith(sample.history, sample.candidates, "undirected")
        ).max()
        for sample in samples
    ]
    return error, float(max(differences))


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
def _stage_beside(repository: Path) -> Iterator[str]:
    """Make a folder on the repository's file system but outside it, where Triton takes every folder for a model."""
    repository.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".kvcast-export-") as folder:
        yield folder


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

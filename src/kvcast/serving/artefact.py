"""An exported model on disk, opened: manifest checked, files unaltered, an ORT session on the best provider."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.manifest import ONNX_FILE, RELEASE_METADATA_KEY, Manifest, hash_file, read_manifest
from kvcast.protocol.tensors import RANKER_FULL

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
# What a run must have for a thread to be worth its waking: with 67 MFLOP a second one gains 9%, with 24 nothing, and
# both then cost twice the CPU time of one.
FLOPS_PER_THREAD = 25e6


@dataclass(frozen=True)
class SessionOptions:
    """What an operator can set in `config.pbtxt`.

    provider: `auto` takes CUDA where it works and the CPU elsewhere; `cpu` and `cuda` insist.
    threads: intra-op threads of the session; 0 means the cores divided by the instances, or as many as pay.
    instances: instances of this model on this machine, which share the cores.
    spins: whether threads wait busily between the operators of a run; never between runs. For a process that
        has the cores to itself while it runs.
    """

    provider: str = "auto"
    threads: int = 0
    instances: int = 1
    spins: bool = False

    def count_threads(self, manifest: Manifest) -> int:
        """Return the threads of one session."""
        cores = len(os.sched_getaffinity(0)) // self.instances
        return self.threads or max(1, min(cores, int(count_flops(manifest) / FLOPS_PER_THREAD)))


@dataclass(frozen=True)
class Artefact:
    """An opened model: its manifest, its session and the provider that the session really runs on."""

    manifest: Manifest
    session: ort.InferenceSession
    threads: int

    @property
    def provider(self) -> str:
        """The execution provider in use, by ONNX Runtime's name."""
        return str(self.session.get_providers()[0])

    @property
    def is_on_gpu(self) -> bool:
        """Whether the session runs on CUDA."""
        return self.provider == CUDA_PROVIDER

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> Arrays:
        """Run the graph once; return the outputs by name.

        Args:
            outputs: names of those wanted.
            feeds: inputs by name.
            into: contiguous arrays that receive outputs where they lie, instead of memory of the session's own.
        """
        if not into:
            return dict(zip(outputs, self.session.run(outputs, feeds), strict=True))
        binding = self.session.io_binding()
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in contiguous.items():
            binding.bind_cpu_input(name, array)
        for name in outputs:
            if name in into:
                array = into[name]
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        made = dict(zip(outputs, binding.get_outputs(), strict=True))
        return {name: into[name] if name in into else value.numpy() for name, value in made.items()}


def open_artefact(folder: Path, model: str, options: SessionOptions) -> Artefact:
    """Open the artefact of `model` in `folder`.

    Raises:
        ArtefactError: a file is missing or altered, belongs to another model or release, or cannot be loaded.
    """
    manifest = read_manifest(folder)
    if manifest.model != model:
        raise ArtefactError(f"{folder}: expected the artefact of {model}, got that of {manifest.model}")
    _check_files(folder, manifest)
    threads = options.count_threads(manifest)
    session = _open_session(folder / ONNX_FILE, options, threads)
    release = session.get_modelmeta().custom_metadata_map.get(RELEASE_METADATA_KEY)
    if release != manifest.release:
        raise ArtefactError(
            f"{folder / ONNX_FILE}: expected release {manifest.release[:12]}, as the manifest says, got {release}"
        )
    return Artefact(manifest, session, threads)


def count_flops(manifest: Manifest) -> float:
    """Return roughly the FLOPs of one user's run of the expected workload: of softmax layers as wide as these."""
    dims, workload = manifest.dims, manifest.workload
    items, tokens = workload.candidates * dims.candidate_tokens, workload.history + dims.candidate_tokens
    rows = workload.candidates * tokens if manifest.model == RANKER_FULL.name else workload.history + items
    return float(dims.layers * rows * (24 * dims.width**2 + 4 * dims.width * tokens))


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            got = hash_file(path)
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be read ({error.strerror}): export again") from error
        if got != expected:
            raise ArtefactError(
                f"{path}: expected SHA-256 {expected[:12]}…, as the manifest says, got {got[:12]}…: export again"
            )


def _open_session(path: Path, wanted: SessionOptions, threads: int) -> ort.InferenceSession:
    provider = wanted.provider
    if provider not in ("auto", "cpu", "cuda"):
        raise ArtefactError(f"execution_provider: expected auto, cpu or cuda, got {provider!r}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Sessions of several models share the cores: one that spins while it is idle doubles the others' latency.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(wanted.spins)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[str | tuple[str, dict[str, str]]]
    has_cuda = CUDA_PROVIDER in ort.get_available_providers()
    if has_cuda and provider != "cpu":
        ort.preload_dlls()  # CUDA's libraries, where they were installed as Python packages
        # TF32 rounds what goes into a GEMM to 10 bits: scores would no longer be those that were proved.
        providers = [(CUDA_PROVIDER, {"use_tf32": "0"}), CPU_PROVIDER]
    else:
        providers = [CPU_PROVIDER]
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise ArtefactError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    if provider == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise ArtefactError("execution_provider: cuda was asked for, and ONNX Runtime can only use the CPU here")
    return session

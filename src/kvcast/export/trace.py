"""`python -m kvcast.export.trace`: graphs traced in a process of their own, so that several are traced at a time.

The parent writes configuration, source of weights and models to standard input, and reads each template from standard
output as soon as it is made, its length before it; what fails is told on standard error.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import BinaryIO, cast

import msgspec
import torch

from kvcast.export.graphs import TracedGraph, TraceError, describe_graphs, trace_graph
from kvcast.export.template import GraphTemplate
from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.networks.weights import WeightsSource, set_weights
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.tensors import EXPORTED_MODELS, RANKER_RESIDENT

# A trace of Python code: more threads would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
REFUSED = 3  # the exit status that goes with a TraceError
LENGTH_BYTES = 8
MOST_WORDS = 2000  # of a process that failed otherwise


class Request(msgspec.Struct):
    """What a process is to trace."""

    config: ModelConfig
    weights: WeightsSource
    models: list[str]


def trace_network(
    config: ModelConfig, weights: WeightsSource, say: Callable[[str], None] = lambda _: None
) -> dict[str, GraphTemplate]:
    """Trace all graphs of a configuration, as many at a time as there are cores; each process holds all weights.

    Args:
        config: of the network.
        weights: that modules may have derived something else from than weights.
        say: receives the name of each model that is traced.

    Returns:
        The templates by model.

    Raises:
        TraceError: a graph cannot be traced.
    """
    models = [model.name for model in EXPORTED_MODELS]
    others = [name for name in models if name != RANKER_RESIDENT.name]
    processes = min(len(os.sched_getaffinity(0)), len(models))
    # That of both sides takes about as long as the others together, and what a process imports takes as long as one.
    shares = [[RANKER_RESIDENT.name], *(others[place :: processes - 1] for place in range(processes - 1))]
    shares = shares if processes > 1 else [models]
    templates: dict[str, GraphTemplate] = {}
    with ThreadPoolExecutor(len(shares)) as pool:
        for done in as_completed([pool.submit(_run_process, config, weights, share, say) for share in shares]):
            templates |= done.result()
    return {name: templates[name] for name in models}


@torch.inference_mode()
def trace_model(network: RankingNetwork, model: str) -> TracedGraph:
    """Trace one graph of a network in this process."""
    return next(trace_graph(graph, network) for graph in describe_graphs(network) if graph.model == model)


def _run_process(
    config: ModelConfig, weights: WeightsSource, models: list[str], say: Callable[[str], None]
) -> dict[str, GraphTemplate]:
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    templates: dict[str, GraphTemplate] = {}
    command = [sys.executable, "-m", "kvcast.export.trace"]
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as errors:
        request.write(msgspec.msgpack.encode(Request(config, weights, models), enc_hook=str))
        request.seek(0)
        process = subprocess.Popen(
            command, stdin=request, stdout=subprocess.PIPE, stderr=errors, env=os.environ | paths | ONE_THREAD
        )
        with process:
            output = cast("BinaryIO", process.stdout)
            while length := output.read(LENGTH_BYTES):
                template = msgspec.msgpack.decode(output.read(int.from_bytes(length)), type=GraphTemplate)
                templates[template.model] = template
                say(template.model)
        if process.returncode:
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip()
            if process.returncode != REFUSED:
                words = f"the process that traces {', '.join(models)} failed: {words[-MOST_WORDS:]}"
            raise TraceError(words)
    return templates


def main() -> int:
    """Trace what standard input asks for; return the exit status."""
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Request, dec_hook=lambda kind, text: kind(text))
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a family prints is no template
    with torch.inference_mode():
        network = build_network(request.config)
        set_weights(network, request.weights)
    try:
        for model in request.models:
            template = msgspec.msgpack.encode(trace_model(network, model).template)
            output.write(len(template).to_bytes(LENGTH_BYTES) + template)
            output.flush()
    except TraceError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m perf.baselines.worker NAME FIELD`: one peer in a process of its own, driven over standard input.

Each line in is a JSON object {"history", "candidates", "seed"}; each line out one with seconds, the scores, and the
memory that the run added at its peak. Peers run one at a time: one that waits for a line uses no core.
"""

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

from kvcast.networks.interface import build_network
from kvcast.networks.weights import draw_weights, load_weights
from kvcast.protocol.config import load_config
from kvcast.synthetic import ClickLog
from perf.baselines.interface import Peer
from perf.baselines.ort_expanded import OrtExpanded
from perf.baselines.ours import FullRecomputation, Ours
from perf.baselines.race import MEMORY_LIMIT_BYTES, Field
from perf.baselines.softmax import SoftmaxNetwork
from perf.baselines.torch_peers import CompiledPeer, TorchPeer, attend_expanded, attend_flash


def make_peer(name: str, field: Field) -> Peer:
    """Return a peer by name, on the configuration's weights, or on those of the field's seed where it comes with none.

    A peer that uses the repository's export has the weights of that.
    """

    def network() -> SoftmaxNetwork:
        config = load_config(field.config)
        built = build_network(config)
        if config.weights is None:
            draw_weights(built, field.seed)
        else:
            load_weights(built, config.weights)
        return cast("SoftmaxNetwork", built)

    makers: dict[str, Callable[[], Peer]] = {
        "shared": lambda: Ours(field.repository, field.threads),
        "traditional": lambda: FullRecomputation(field.repository, field.threads),
        "ort_expanded": lambda: OrtExpanded(network(), field.threads),
        "torch_expanded": lambda: TorchPeer(network(), attend_expanded, field.threads),
        "torch_flash": lambda: TorchPeer(network(), attend_flash, field.threads),
        "torch_flash_compiled": lambda: CompiledPeer(network(), attend_flash, field.threads),
    }
    return makers[name]()


def read_memory(field: str) -> int:
    """Return `VmRSS` or `VmHWM` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_once(peer: Peer, log: ClickLog, order: dict[str, int]) -> dict[str, object]:
    """Encode and fuse one request, timed."""
    request = log.draw_request(order["history"], order["candidates"])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read_memory("VmRSS")
    started = time.perf_counter()
    user_kv = peer.encode(request.history)
    encoded = time.perf_counter()
    scores = peer.fuse(user_kv, request.candidates)
    fused = time.perf_counter()
    added = read_memory("VmHWM") - before
    return {
        "encode": encoded - started,
        "fuse": fused - encoded,
        "added_bytes": max(0, added),
        "scores": [float(score) for score in scores[:50]],
    }


def main(name: str, field: Field) -> None:
    """Make the peer, then serve orders until standard input ends."""
    warnings.simplefilter("ignore")  # deprecations inside torch's exporter
    answer_to = sys.stdout
    sys.stdout = sys.stderr  # compilers print; the answers have the pipe for themselves
    peer = make_peer(name, field)
    # A peer that would copy the KV beyond all memory fails alone, and not the machine.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    schema = load_config(field.config).schema
    logs: dict[int, ClickLog] = {}
    print(json.dumps({"ready": name}), file=answer_to, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        log = logs.setdefault(order["seed"], ClickLog(schema, order["seed"]))
        try:
            answer = run_once(peer, log, order)
        except Exception as error:  # noqa: BLE001 running out of memory has as many types as libraries
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(json.dumps(answer), file=answer_to, flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    main(sys.argv[1], Field(**given | {"repository": Path(given["repository"])}))

"""`python -m kvcast.export.mask_effect`: what the choice of mask changes, measured on a network with random weights.

Prints one JSON document: how far scores under the undirected mask lie from those under the target-blind mask, for
several history lengths, and how far other candidates move the user tokens' keys in each layer. docs/mask.md shows it.
"""

import argparse
import json
import platform
import sys
from importlib import metadata

import numpy as np
import torch

from kvcast.export.calls import TorchCalls
from kvcast.export.proofs import draw_sample
from kvcast.networks.interface import build_network
from kvcast.networks.weights import draw_weights
from kvcast.protocol.config import load_config

LENGTHS = (1, 10, 100, 1000)
CANDIDATES = 8


@torch.inference_mode()
def measure_mask_effect(name: str, seed: int) -> dict[str, object]:
    """Return the measurement for one configuration and one seed of weights and requests."""
    config = load_config(name)
    network = build_network(config)
    draw_weights(network, seed)
    calls = TorchCalls(network)
    rows = []
    for length in (length for length in LENGTHS if length <= config.limits.history):
        sample = draw_sample(config.schema, length, CANDIDATES, seed)
        others = draw_sample(config.schema, 1, CANDIDATES, seed + 1).candidates
        blind = calls.run_monolith(sample.history, sample.candidates)
        seeing = calls.run_monolith(sample.history, sample.candidates, "undirected")
        before, after = (
            calls.probe_user_keys(sample.history, each, "undirected") for each in (sample.candidates, others)
        )
        rows.append(
            {
                "history": length,
                "score_difference_max": float(np.abs(blind - seeing).max()),
                "score_difference_mean": float(np.abs(blind - seeing).mean()),
                "score_deviation": float(blind.std()),
                "key_difference_by_layer": [
                    float(np.abs(one - two).max()) for one, two in zip(before, after, strict=True)
                ],
            }
        )
    versions = {"python": platform.python_version(), "torch": metadata.version("torch")}
    return {"config": name, "seed": seed, "candidates": CANDIDATES, "dtype": "FP32", "versions": versions, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvcast.export.mask_effect", description=__doc__)
    parser.add_argument("--config", default="bench")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(json.dumps(measure_mask_effect(arguments.config, arguments.seed), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

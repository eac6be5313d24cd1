"""FLOPs, bytes and ideal speedups, computed from a configuration; and the source documents' own claims beside them.

A multiply-add counts as 2 FLOPs; embeddings and normalisation are left out. The network states the cost of a layer
(`RankingNetwork.count_layer_flops`); it is built without memory for its weights.
"""

from dataclasses import dataclass

import torch

from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.protocol.config import ModelConfig

# The source documents assume that fusing a candidate costs this share of encoding a user, and that a long history
# costs a service this share of its throughput.
CLAIMED_FUSION_SHARE = 0.15
CLAIMED_THROUGHPUT_DROP = 0.40


@dataclass(frozen=True)
class CostModel:
    """Costs of one request: history L, width d, layers M, heads H, tokens of a candidate T."""

    history: int
    width: int
    layers: int
    heads: int
    candidate_tokens: int
    layer_flops: tuple[float, float]
    """Of one layer: for a token, and for each token it looks at. None: attention and a feed-forward part, 4·d wide."""

    @classmethod
    def of(cls, config: ModelConfig, history: int | None = None) -> "CostModel":
        """Return the cost model of a configuration, at its workload's L unless another is given."""
        network = config.network
        length = config.workload.history if history is None else history
        tokens, flops = len(config.schema.candidate_fields), build_shape(config).count_layer_flops()
        return cls(length, network.width, network.layers, network.heads, tokens, flops)

    def user_flops(self, *, trimmed: bool = True) -> float:
        """FLOPs of encoding the history; `trimmed` computes only keys and values in the last layer."""
        full_layers = self.layers - 1 if trimmed else self.layers
        last = 4 * self.width**2 * self.history if trimmed else 0
        return full_layers * self._count_layer(self.history, self.history) + last

    def fusion_flops(self) -> float:
        """FLOPs of fusing one candidate (all its tokens in every layer)."""
        return self.layers * self._count_layer(self.candidate_tokens, self.history + self.candidate_tokens)

    def shared_flops(self, candidates: int) -> float:
        """FLOPs of a request in the shared scheme."""
        return self.user_flops() + candidates * self.fusion_flops()

    def full_flops(self, candidates: int) -> float:
        """FLOPs of a request by full recomputation: every candidate a full sequence."""
        tokens = self.history + self.candidate_tokens
        return candidates * self.layers * self._count_layer(tokens, tokens)

    def ideal_speedup(self, candidates: int) -> float:
        """Full recomputation ÷ shared, in FLOPs."""
        return self.full_flops(candidates) / self.shared_flops(candidates)

    def user_kv_bytes(self, itemsize: int = 4) -> int:
        """Bytes of one user's keys and values, without the layout's extra rows."""
        return 2 * self.layers * self.history * self.width * itemsize

    def _count_layer(self, tokens: int, seen: int) -> float:
        """FLOPs of one layer for `tokens` that look at `seen` tokens each."""
        token, pair = self.layer_flops
        return tokens * (token + pair * seen)


def build_shape(config: ModelConfig) -> RankingNetwork:
    """Build the network of a configuration without memory for its weights: shapes alone."""
    with torch.device("meta"):
        return build_network(config)


def claimed_speedup(candidates: int) -> float:
    """The documents' Speedup(N) = N / (0.85 + 0.15·N)."""
    return candidates / (1 - CLAIMED_FUSION_SHARE + CLAIMED_FUSION_SHARE * candidates)


def claimed_gain(candidates: int) -> float:
    """The documents' gain = 0.85 · (N - 1) / N."""
    return (1 - CLAIMED_FUSION_SHARE) * (candidates - 1) / candidates


def throughput_drop(cost_ratio: float) -> float:
    """What the long history costs a service's throughput, by the documents' metric: 40% × shared ÷ full cost."""
    return CLAIMED_THROUGHPUT_DROP * cost_ratio


def describe(config: ModelConfig, counts: tuple[int, ...] = (1, 5, 10, 50, 100, 1000)) -> str:
    """Return the cost model as text."""
    model = CostModel.of(config)
    kv = ", ".join(
        f"{name} {model.user_kv_bytes(size) / 1e6:.1f} MB" for name, size in (("fp32", 4), ("fp16", 2), ("int8", 1))
    )
    full, fuse = model.user_flops(trimmed=False) / 1e9, model.fusion_flops() / 1e9
    share = model.fusion_flops() / model.user_flops()
    lines = [
        f"{config.name}: L={model.history} d={model.width} M={model.layers} H={model.heads} T={model.candidate_tokens}",
        f"  encode a user          {full:10.4g} GFLOP, {model.user_flops() / 1e9:.4g} with the last layer trimmed",
        f"  fuse a candidate       {fuse:10.4g} GFLOP, {share:.4f} of encoding (documents: {CLAIMED_FUSION_SHARE})",
        f"  recompute, each        {model.full_flops(1) / 1e9:10.4g} GFLOP",
        f"  user KV                {kv}",
        "",
        "     N   claimed speedup   ideal speedup   claimed drop   ideal drop   KV not copied",
    ]
    for count in counts:
        ideal = model.ideal_speedup(count)
        lines.append(
            f"  {count:>4}   {claimed_speedup(count):>15.2f}   {ideal:>13.1f}   "
            f"{100 * throughput_drop(1 - claimed_gain(count)):>11.1f}%   {100 * throughput_drop(1 / ideal):>9.2f}%   "
            f"{(count - 1) * model.user_kv_bytes() / 1e9:>10.2f} GB"
        )
    return "\n".join(lines)

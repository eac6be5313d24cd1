"""Peers in torch: SDPA over KV expanded to N copies, and flash attention merged by log-sum-exp, eager and compiled.

They run the same weights through `network`'s blocks; only attention is their own.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from perf.baselines.interface import Floats, Ids, Peer
from perf.baselines.softmax import SoftmaxLayer, SoftmaxNetwork

KV = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
# (query, key, value of the items [N, T, H, dh], user key, user value [1, H, L, dh]) → [N, Q, H, dh]
ItemAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_expanded(query: Tensor, key: Tensor, value: Tensor, user_key: Tensor, user_value: Tensor) -> Tensor:
    """SDPA with the user's KV expanded over the N candidates and concatenated with the item's own."""
    count = query.shape[0]
    keys = torch.cat([user_key.expand(count, -1, -1, -1), key.transpose(1, 2)], dim=2)  # [N, H, L+T, dh]
    values = torch.cat([user_value.expand(count, -1, -1, -1), value.transpose(1, 2)], dim=2)
    return scaled_dot_product_attention(query.transpose(1, 2), keys, values).transpose(1, 2)


def attend_flash(query: Tensor, key: Tensor, value: Tensor, user_key: Tensor, user_value: Tensor) -> Tensor:
    """Flash attention of the folded queries over the user's KV, merged with the item's own by log-sum-exp."""
    count, tokens, heads, width = query.shape
    folded = query.permute(2, 0, 1, 3).reshape(1, heads, count * tokens, width)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the only CPU op that returns the LSE
    user_output, user_share = flash(folded, user_key, user_value)  # [1, H, N·Q, dh], [1, H, N·Q]
    user_output = user_output.view(heads, count, tokens, width).permute(1, 2, 0, 3)
    user_share = user_share.view(heads, count, tokens).permute(1, 2, 0)[..., None]  # [N, Q, H, 1]
    scores = torch.einsum("nqhd,nthd->nqht", query, key) * width**-0.5
    item_share = scores.logsumexp(dim=-1, keepdim=True)
    item_output = torch.einsum("nqht,nthd->nqhd", (scores - item_share).exp(), value)
    weight = torch.sigmoid(user_share - item_share)
    merged: Tensor = weight * user_output + (1 - weight) * item_output
    return merged


class Encode(nn.Module):
    """The user side on torch's SDPA, last layer trimmed."""

    def __init__(self, network: SoftmaxNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, history: Tensor) -> KV:
        """INT64 `[1, L, fields]` → keys and values, `[1, H, L, dh]` a layer."""
        tokens = self.network._embed_history(history, torch.ones(history.shape[:2], dtype=torch.bool))
        keys, values = [], []
        blocks = cast("list[SoftmaxLayer]", list(self.network.blocks))
        for index, block in enumerate(blocks):
            normed = block.attention_norm(tokens)
            key, value = (block.split_heads(part(normed)).transpose(1, 2) for part in (block.key, block.value))
            keys.append(key)
            values.append(value)
            if index < len(blocks) - 1:
                query = block.split_heads(block.query(normed)).transpose(1, 2)
                tokens = block.close(tokens, scaled_dot_product_attention(query, key, value).transpose(1, 2))
        return tuple(keys), tuple(values)


class Fuse(nn.Module):
    """The item side, last layer trimmed, on one of the attentions above."""

    def __init__(self, network: SoftmaxNetwork, attention: ItemAttention) -> None:
        super().__init__()
        self.network, self.attention = network, attention

    def forward(self, candidates: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        """INT64 `[N, T]` and the user's KV → FP32 `[N]`."""
        tokens = self.network._embed_candidates(candidates[None])[0]  # [N, T, d]
        blocks = cast("list[SoftmaxLayer]", list(self.network.blocks))
        for index, block in enumerate(blocks):
            normed = block.attention_norm(tokens)
            key, value = block.split_heads(block.key(normed)), block.split_heads(block.value(normed))
            if index == len(blocks) - 1:
                tokens, normed = tokens[:, :1], normed[:, :1]
            query = block.split_heads(block.query(normed))
            tokens = block.close(tokens, self.attention(query, key, value, keys[index], values[index]))
        return self.network._read_scores(tokens[:, 0])


class TorchPeer(Peer):
    """Eager torch."""

    def __init__(self, network: SoftmaxNetwork, attention: ItemAttention, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encode: Callable[..., Any] = Encode(network)
        self._fuse: Callable[..., Any] = Fuse(network, attention)

    @torch.inference_mode()
    def encode(self, history: Ids) -> KV:
        """Run the user side."""
        return cast("KV", self._encode(torch.from_numpy(history)[None]))

    @torch.inference_mode()
    def fuse(self, user_kv: KV, candidates: Ids) -> Floats:
        """Run the item side."""
        return np.asarray(self._fuse(torch.from_numpy(candidates), *user_kv).numpy(), np.float32)


class CompiledPeer(TorchPeer):
    """Both sides compiled ahead of time by AOTInductor, for any L and N."""

    def __init__(self, network: SoftmaxNetwork, attention: ItemAttention, threads: int) -> None:
        super().__init__(network, attention, threads)
        schema = network.config.schema
        history = torch.ones(1, 64, len(schema.history_fields), dtype=torch.int64)
        candidates = torch.ones(6, len(schema.candidate_fields), dtype=torch.int64)
        length, count = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
        with torch.no_grad():
            keys, values = self._encode(history)
            layers = len(keys)
            self._encode = compile_ahead(self._encode, (history,), ({1: length},))
            axes = ({2: length},) * layers
            self._fuse = compile_ahead(self._fuse, (candidates, keys, values), ({0: count}, axes, axes))


def compile_ahead(module: Any, sample: tuple[Any, ...], dynamic_shapes: Any) -> Callable[..., Any]:
    """Compile a module with AOTInductor and return the loaded package."""
    program = torch.export.export(module, sample, dynamic_shapes=dynamic_shapes)
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "peer.pt2"))
        return cast("Callable[..., Any]", torch._inductor.aoti_load_package(package))

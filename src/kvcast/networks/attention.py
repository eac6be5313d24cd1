"""Attention, twice: the plain form that anyone can check, and the shared form that is served.

The shared form never copies user KV over candidates: the N·T queries of all candidates are folded into the rows
of one GEMM a head against the user's keys. The item's own T keys are merged exactly, by their log-sum-exp, through
one extra *sink* slot of the user KV:

    s2 = q·k_itemᵀ          l2 = logsumexp(s2)          o2 = softmax(s2)·v_item
    Q  = [q | l2 | 1]       K = [[k_user, 0], [0, 1], [mask, 0]]       V = [[v_user | 0], [0 | 1]]
    O  = softmax(Q·K)·V     out = O[:dh] + O[dh]·o2

The sink's score is l2, its weight in the softmax is therefore the item tokens' total share, and its value column
carries that share out of the GEMM. An empty history leaves the sink alone: O[dh] = 1, out = o2. Splitting softmax
by log-sum-exp is the merge step of flash decoding (Dao et al., 2023); the sink makes it free of concatenation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kvcast.networks.branch import choose
from kvcast.networks.masks import MASKED
from kvcast.protocol.schema import KVLayout

# Extra rows under the transposed keys, and where they stand: the sink's row, then the mask's.
SINK_ROWS = 1
MASK_ROWS = 1


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Plain attention, softmax(Q·Kᵀ/√dh + mask)·V: the slow reference.

    query, key, value: `[B, H, S, dh]`; mask broadcasts to `[B, H, S, S]`. Returns `[B, H, S, dh]`.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask  # [B, H, S, S]
    return scores.softmax(dim=-1) @ value


def make_layout(layers: int, heads: int, head_width: int) -> KVLayout:
    """Return the layout that `pack_user_kv` writes: the sink in slot 0, events after it."""
    return KVLayout(
        layers=layers,
        heads=heads,
        key_rows=head_width + SINK_ROWS + MASK_ROWS,
        value_columns=head_width + SINK_ROWS,
        lead_slots=1,
        mask_row=head_width + SINK_ROWS,
        mask_value=MASKED,
    )


def pack_user_kv(key: Tensor, value: Tensor, is_event: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out one layer's keys and values of the user tokens for sharing.

    Args:
        key: `[B, L, H, dh]`.
        value: `[B, L, H, dh]`.
        is_event: BOOL `[B, L]`; padding gets a masked slot.

    Returns:
        keys `[B, H, dh+2, 1+L]` and values `[B, H, 1+L, dh+1]`.
    """
    users, _, heads, head_width = key.shape
    # The sink: key (0, …, 0, 1, 0), value (0, …, 0, 1). Events: a 0 in the sink's places, and the mask.
    mask_row = torch.where(is_event, 0.0, MASKED)[:, None, None].expand(-1, heads, -1, -1)  # [B, H, 1, L]
    event_rows = torch.cat([torch.zeros_like(mask_row), mask_row], dim=2)  # [B, H, 2, L]
    sink_rows = torch.cat([key.new_ones(1), key.new_zeros(1)]).view(2, 1).expand(users, heads, -1, -1)
    sink = key.new_zeros(1, 1, 1, 1).expand(users, heads, -1, -1)
    event_keys = torch.cat([sink.expand(-1, -1, head_width, -1), key.permute(0, 2, 3, 1)], dim=3)
    keys = torch.cat([event_keys, torch.cat([sink_rows, event_rows], dim=3)], dim=2)  # [B, H, dh+2, 1+L]
    event_values = torch.cat([sink.expand(-1, -1, -1, head_width), value.transpose(1, 2)], dim=2)
    shares = torch.cat([sink + 1, event_rows[:, :, :1].transpose(2, 3)], dim=2)  # [B, H, 1+L, 1]
    return keys, torch.cat([event_values, shares], dim=3)  # … and [B, H, 1+L, dh+1]


@torch.library.custom_op("kvcast::attend_unmasked", mutates_args=())
def attend_unmasked(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention where every token sees every token, as one operator that need not write the score matrix down.

    query, key, value: `[B, L, d]`. Returns `[B, L, d]`. An operator of its own, so that export can hand it to ONNX
    Runtime's MultiHeadAttention, whose tiled path (without mask) is faster and needs memory in L, not in L².
    """
    return _attend_all(query, key, value, heads).clone()


def _attend_all(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """What `attend_unmasked` computes."""
    query, key, value = (
        each.view(*each.shape[:2], heads, each.shape[2] // heads).transpose(1, 2) for each in (query, key, value)
    )
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)  # [B, H, L, dh]
    return attended.transpose(1, 2).flatten(2)


@attend_unmasked.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:  # noqa: ARG001 the operator's signature
    return torch.empty_like(query)


def _keep_for_gradients(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:  # noqa: ARG001
    """Keep what `_differentiate` needs: the inputs, not the score matrix."""
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key and value: attention once more, with PyTorch's own derivative."""
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        attended = _attend_all(query, key, value, ctx.heads)
        return *torch.autograd.grad(attended, (query, key, value), gradient), None


# A custom operator has no derivative by itself, and training takes the same path as serving.
attend_unmasked.register_autograd(_differentiate, setup_context=_keep_for_gradients)

# The operator as a graph names it.
ATTEND_UNMASKED = torch.ops.kvcast.attend_unmasked.default


def attend_history(
    query: Tensor, key: Tensor, value: Tensor, is_event: Tensor, user_keys: Tensor, user_values: Tensor
) -> Tensor:
    """Attention of the user tokens over each other: unmasked where nothing is padding, masked where something is.

    Args:
        query: `[B, L, H, dh]`.
        key: `[B, L, H, dh]`.
        value: `[B, L, H, dh]`.
        is_event: BOOL `[B, L]`.
        user_keys: `[B, H, dh+2, 1+L]`, the same keys as packed.
        user_values: `[B, H, 1+L, dh+1]`, the same values as packed.

    Returns:
        `[B, L, H, dh]`.
    """

    def unmasked(plain: tuple[Tensor, Tensor, Tensor], packed: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG001
        heads = plain[0].shape[2]
        attended: Tensor = attend_unmasked(*(each.flatten(2) for each in plain), heads)
        return attended.view(plain[0].shape)

    def masked(plain: tuple[Tensor, Tensor, Tensor], packed: tuple[Tensor, Tensor]) -> Tensor:
        return attend_history_masked(plain[0], *packed).contiguous()

    attended: Tensor = choose(is_event.all(), unmasked, masked, (query, key, value), (user_keys, user_values))
    return attended


def attend_history_masked(query: Tensor, user_keys: Tensor, user_values: Tensor) -> Tensor:
    """Attention of the user tokens over each other, on the packed KV of one layer.

    query: `[B, L, H, dh]`; user_keys: `[B, H, dh+2, 1+L]`; user_values: `[B, H, 1+L, dh+1]`. The sink is switched
    off by giving it the score of padding. Returns `[B, L, H, dh]`.
    """
    head_width = query.shape[-1]
    folded = (query / math.sqrt(head_width)).transpose(1, 2)  # [B, H, L, dh]
    no_sink = torch.full_like(folded[..., :1], MASKED)
    augmented = torch.cat([folded, no_sink, torch.ones_like(no_sink)], dim=-1)  # [B, H, L, dh+2]
    output = (augmented @ user_keys).softmax(dim=-1) @ user_values  # [B, H, L, dh+1]
    return output[..., :head_width].transpose(1, 2)


def attend_user_and_item(query: Tensor, key: Tensor, value: Tensor, user_keys: Tensor, user_values: Tensor) -> Tensor:
    """Attention of item tokens over all user tokens and the tokens of their own item, in the shared form.

    Args:
        query: `[B, N, Q, H, dh]`, the Q item tokens of each candidate whose output is wanted.
        key: `[B, N, T, H, dh]`, all tokens of each candidate.
        value: `[B, N, T, H, dh]`.
        user_keys: `[B, H, dh+2, 1+L]`, one layer as packed.
        user_values: `[B, H, 1+L, dh+1]`.

    Returns:
        `[B, N, Q, H, dh]`.
    """
    head_width = query.shape[-1]
    item_query = (query / math.sqrt(head_width)).permute(0, 3, 1, 2, 4)  # [B, H, N, Q, dh]
    item_scores = item_query @ key.permute(0, 3, 1, 4, 2)  # [B, H, N, Q, T]
    peak = item_scores.amax(dim=-1, keepdim=True)
    weights = (item_scores - peak).exp()
    total = weights.sum(dim=-1, keepdim=True)
    item_share = peak + total.log()  # [B, H, N, Q, 1]: log-sum-exp of the item's own scores
    item_output = (weights / total) @ value.permute(0, 3, 1, 2, 4)  # [B, H, N, Q, dh]

    augmented = torch.cat([item_query, item_share, torch.ones_like(item_share)], dim=-1)
    rows = augmented.flatten(2, 3)  # [B, H, N·Q, dh+2]
    shared = (rows @ user_keys).softmax(dim=-1) @ user_values  # [B, H, N·Q, dh+1]
    shared = shared.view(*item_output.shape[:4], shared.shape[-1])  # [B, H, N, Q, dh+1]
    output = shared[..., :head_width] + shared[..., head_width:] * item_output
    return output.permute(0, 2, 3, 1, 4)  # [B, N, Q, H, dh]

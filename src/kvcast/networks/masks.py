"""Which tokens may attend to which in a monolithic sequence `[item tokens | history tokens]`.

`target_blind` is the mask that is served: history never looks at the candidate, so its keys and values are the
same for every candidate. `undirected` is the reference of the source documents: every token sees every token.
"""

import torch
from torch import Tensor

from kvcast.networks.interface import MaskKind

# Added to a score that must not count: exp(MASKED - anything sane) is exactly 0 in fp32, and no sum is NaN.
MASKED = -1e9


def find_events(history: Tensor) -> Tensor:
    """Return BOOL `[B, L]`: True where a history event is real, False where all its fields are 0 (padding)."""
    return (history != 0).any(dim=-1)


def make_monolith_mask(is_event: Tensor, item_tokens: int, mask: MaskKind) -> Tensor:
    """Return the additive mask of sequences of `item_tokens` and then L history tokens.

    Args:
        is_event: BOOL `[B, L]`, which history tokens are real.
        item_tokens: T.
        mask: `target_blind` hides item tokens from history tokens, `undirected` hides nothing but padding.

    Returns:
        FP32 `[B, 1, T+L, T+L]`: 0 where the row's token sees the column's, `MASKED` where it does not.
    """
    users, history_length = is_event.shape
    length = item_tokens + history_length
    is_item = torch.arange(length, device=is_event.device) < item_tokens
    is_real = torch.cat([is_event.new_ones(users, item_tokens), is_event], dim=1)  # [B, T+L]
    is_visible = is_real[:, None, :].expand(users, length, length)
    if mask == "target_blind":
        is_visible = is_visible & ~(~is_item[:, None] & is_item[None, :])
    return torch.where(is_visible, 0.0, MASKED)[:, None]  # [B, 1, T+L, T+L]

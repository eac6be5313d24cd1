"""The first family: a pre-LN transformer, the shape of LONGER's undirected version made target-blind.

A history token is the sum of its fields' embeddings and a position; each candidate attribute is a token of its
own, the sum of its embedding and a type embedding. Fields of one name share one table. The score is read from the
target token (the first). In the last layer nothing is computed that no score needs: of the user only keys and
values, of an item only the target token.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from kvcast.networks.attention import (
    attend,
    attend_history,
    attend_user_and_item,
    make_layout,
    pack_user_kv,
)
from kvcast.networks.branch import choose
from kvcast.networks.interface import MaskKind, RankingNetwork, UserKV
from kvcast.networks.masks import find_events, make_monolith_mask
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.schema import KVLayout

FEED_FORWARD_FACTOR = 4


class Block(nn.Module):
    """One pre-LN layer. Its parts are called apart, because the user side and the item side need different ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, FEED_FORWARD_FACTOR * width)
        self.contract = nn.Linear(FEED_FORWARD_FACTOR * width, width)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`[..., d]` → `[..., H, dh]`."""
        return tokens.view(*tokens.shape[:-1], self.heads, tokens.shape[-1] // self.heads)

    def close(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Add attention `[..., H, dh]` to the residual stream `[..., d]`, then the feed-forward part."""
        tokens = tokens + self.output(attended.flatten(-2))
        hidden = nn.functional.gelu(self.expand(self.feed_forward_norm(tokens)))
        return tokens + cast("Tensor", self.contract(hidden))


KV = tuple[Tensor, Tensor]  # one layer: user keys and values as packed
Item = tuple[Tensor, Tensor, Tensor]  # query [B, N, Q, H, dh], key and value [B, N, T, H, dh]
User = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key and value [B, L, H, dh], is_event [B, L]


def _attend_past(past: KV, made: KV, item: Item) -> Tensor:  # noqa: ARG001 one signature for both sides of an If
    """Item tokens over past KV."""
    return attend_user_and_item(*item, *past).contiguous()


def _attend_made(past: KV, made: KV, item: Item) -> Tensor:  # noqa: ARG001
    """Item tokens over the KV just made."""
    return attend_user_and_item(*item, *made).contiguous()


def _attend_items_past(past: KV, made: KV, item: Item, user: User) -> tuple[Tensor, Tensor]:
    """Item tokens over past KV; what the user tokens get is not read."""
    return user[0] * 0, _attend_past(past, made, item)


def _attend_both(past: KV, made: KV, item: Item, user: User) -> tuple[Tensor, Tensor]:
    """User tokens over each other, and item tokens over the KV just made."""
    return attend_history(*user, *made), _attend_made(past, made, item)


class Transformer(RankingNetwork):
    """Pre-LN transformer ranker. Weights are shared by all three calls."""

    version = 1

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        network, schema = config.network, config.schema
        vocabularies = {field.name: field.vocab_size for field in schema.history_fields}
        vocabularies |= {field.name: field.vocab_size for field in schema.candidate_fields}
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(size, network.width) for name, size in vocabularies.items()}
        )
        self.positions = nn.Embedding(config.limits.history, network.width)
        self.types = nn.Embedding(len(schema.candidate_fields), network.width)
        self.blocks = nn.ModuleList(Block(network.width, network.heads) for _ in range(network.layers))
        self.score_norm = nn.LayerNorm(network.width)
        self.score = nn.Linear(network.width, 1)

    @property
    def kv_layout(self) -> KVLayout:
        """The sink layout of `kvcast.networks.attention`."""
        network = self.config.network
        return make_layout(network.layers, network.heads, network.head_width)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights that keep every layer's output near unit size, so that all parts matter to a score."""
        residual_gain = 1 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("norm.weight"):
                parameter.mul_(0.1).add_(1)
            elif name.endswith("bias"):
                parameter.mul_(0.1)
            elif name.startswith(("blocks", "score")):
                parameter.mul_(1 / math.sqrt(parameter.shape[1]))
                if name.endswith(("output.weight", "contract.weight")):
                    parameter.mul_(residual_gain)

    def encode_user(self, history: Tensor) -> UserKV:
        """Encode histories INT64 `[B, L, history_fields]` into the user KV of every layer."""
        is_event = find_events(history)
        tokens = self._embed_history(history, is_event)  # [B, L, d]
        keys, values = [], []
        for index, block in enumerate(self._get_blocks()):
            normed = block.attention_norm(tokens)
            key, value = block.split_heads(block.key(normed)), block.split_heads(block.value(normed))
            user_keys, user_values = pack_user_kv(key, value, is_event)
            keys.append(user_keys)
            values.append(user_values)
            if index < len(self.blocks) - 1:
                query = block.split_heads(block.query(normed))
                tokens = block.close(tokens, attend_history(query, key, value, is_event, user_keys, user_values))
        return UserKV(tuple(keys), tuple(values))

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        """Score candidates INT64 `[B, N, T]` against their user's KV: FP32 `[B, N]`."""
        tokens = self._embed_candidates(candidates)  # [B, N, T, d]
        for index, block in enumerate(self._get_blocks()):
            normed = block.attention_norm(tokens)
            key, value = block.split_heads(block.key(normed)), block.split_heads(block.value(normed))
            if index == len(self.blocks) - 1:
                tokens, normed = tokens[:, :, :1], normed[:, :, :1]  # the target token only
            query = block.split_heads(block.query(normed))
            attended = attend_user_and_item(query, key, value, user_kv.keys[index], user_kv.values[index])
            tokens = block.close(tokens, attended)
        return self._read_scores(tokens[:, :, 0])

    def rank(self, history: Tensor, candidates: Tensor, past: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        """Run user and item tokens as rows of the same GEMMs; only attention tells them apart.

        Every weight occurs once in the graph, whether the KV is past or new.
        """
        is_event = find_events(history)
        history_length, count, item_tokens = history.shape[1], candidates.shape[1], candidates.shape[2]
        history_tokens, candidate_tokens = self._embed_history(history, is_event), self._embed_candidates(candidates)
        tokens = torch.cat([history_tokens, candidate_tokens.flatten(1, 2)], dim=1)  # [B, L+N·T, d]
        keys, values = [], []

        def split(rows: Tensor) -> tuple[Tensor, Tensor]:
            """`[B, L+N·T, …]` → `[B, L, …]` and `[B, N, T, …]`."""
            return rows[:, :history_length], rows[:, history_length:].view(
                rows.shape[0], count, item_tokens, *rows.shape[2:]
            )

        for index, block in enumerate(self._get_blocks()):
            normed = block.attention_norm(tokens)
            user_key, item_key = split(block.split_heads(block.key(normed)))
            user_value, item_value = split(block.split_heads(block.value(normed)))
            user_keys, user_values = pack_user_kv(user_key, user_value, is_event)
            keys.append(user_keys)
            values.append(user_values)
            layer_past, layer_made = (past.keys[index], past.values[index]), (user_keys, user_values)
            if index == len(self.blocks) - 1:
                tokens, normed = split(tokens)[1][:, :, 0], split(normed)[1][:, :, 0]  # target tokens only: [B, N, d]
                query = block.split_heads(block.query(normed))[:, :, None]  # [B, N, 1, H, dh]
                item = (query, item_key, item_value)
                attended = choose(use_past, _attend_past, _attend_made, layer_past, layer_made, item)[:, :, 0]
            else:
                user_query, item_query = split(block.split_heads(block.query(normed)))
                item, user = (item_query, item_key, item_value), (user_query, user_key, user_value, is_event)
                by_user, by_item = choose(
                    use_past, _attend_items_past, _attend_both, layer_past, layer_made, item, user
                )
                attended = torch.cat([by_user, by_item.flatten(1, 2)], dim=1)  # [B, L+N·T, H, dh]
            tokens = block.close(tokens, attended)
        return self._read_scores(tokens), UserKV(tuple(keys), tuple(values))

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Score every candidate in a full sequence `[item tokens | history tokens]` of its own."""
        users, count, item_tokens = candidates.shape
        is_event = find_events(history)
        history_tokens = self._embed_history(history, is_event)  # [B, L, d]
        repeated = history_tokens[:, None].expand(-1, count, -1, -1)  # [B, N, L, d]
        tokens = torch.cat([self._embed_candidates(candidates), repeated], dim=2).flatten(0, 1)
        attention_mask = make_monolith_mask(is_event, item_tokens, mask)  # [B, 1, T+L, T+L]
        attention_mask = attention_mask[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
        user_keys = []
        for block in self._get_blocks():
            normed = block.attention_norm(tokens)
            query, key, value = (
                block.split_heads(part(normed)).transpose(1, 2)  # [B·N, H, T+L, dh]
                for part in (block.query, block.key, block.value)
            )
            user_keys.append(key[:, :, item_tokens:].reshape(users, count, *key[0, :, item_tokens:].shape))
            tokens = block.close(tokens, attend(query, key, value, attention_mask).transpose(1, 2))
        return self._read_scores(tokens[:, 0]).view(users, count), tuple(user_keys)

    def _get_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed_history(self, history: Tensor, is_event: Tensor) -> Tensor:
        """`[B, L, history_fields]` → `[B, L, d]`. A position counts real events only, oldest first."""
        position = (is_event.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, L]
        tokens = self.positions(position)
        for column, field in enumerate(self.config.schema.history_fields):
            tokens = tokens + self.embeddings[field.name](history[:, :, column])
        return cast("Tensor", tokens)

    def _embed_candidates(self, candidates: Tensor) -> Tensor:
        """`[B, N, T]` → `[B, N, T, d]`: a token an attribute."""
        attributes = [
            self.embeddings[field.name](candidates[:, :, column])
            for column, field in enumerate(self.config.schema.candidate_fields)
        ]
        return torch.stack(attributes, dim=2) + self.types.weight

    def _read_scores(self, target_tokens: Tensor) -> Tensor:
        """`[..., d]` → `[...]`."""
        return cast("Tensor", self.score(self.score_norm(target_tokens))).squeeze(-1)

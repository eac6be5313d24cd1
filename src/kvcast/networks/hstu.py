"""HSTU made target-blind: attention without softmax, one projection a layer, relative position and time.

After Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (2024). One layer, of tokens x with positions p and times t:

    K, V, Q, U = silu(W·LN(x) + b)
    a_ij = silu(q_i·k_j / √dh + position[p_i - p_j] + time[bucket(|t_i - t_j|)]) / Lmax      for each j that i sees
    x_i ← x_i + W_o·(LN(Σ_j a_ij·v_j) * u_i) + b_o

There is no feed-forward part. What differs from the paper is what this project is about: events see each other both
ways, and none sees a candidate. A candidate's attributes are tokens at one place, after the last event; their *now* is
the time of the latest event. Every sum is divided by the same constant Lmax, the history's limit: neither padding nor
other candidates count, nor does the number of events, which would turn a sum, in which intensity shows, into a mean.

Without softmax a sum over user and item tokens is two sums, so fusion needs no sink:

    O = silu(Q·K + bias)·V + silu(q·k_item + own bias)·v_item

All items stand at one place and time, so their bias against an event is a number of that event alone: `encode_user`
writes it under the keys, as a row that meets a 1 in the query, and it costs fusion one more row of a GEMM.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kvcast.networks.branch import choose
from kvcast.networks.interface import MaskKind, RankingNetwork, UserKV
from kvcast.networks.masks import find_events, make_monolith_mask
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.schema import KVLayout

# The row under a head's transposed keys that holds the bias of items against each event.
BIAS_ROWS = 1
# Differences of time share a bucket up to the next power of two, from there on they share the last one.
LONGEST_DIFFERENCE = 1 << 20
KNOWN_BUCKETS = LONGEST_DIFFERENCE.bit_length() + 1
UNKNOWN_BUCKET = KNOWN_BUCKETS  # of two tokens of which one has no time
KV = tuple[Tensor, Tensor]  # one layer: user keys and values


class Places(NamedTuple):
    """Where tokens stand: positions and times, INT64 `[B, S]`. A time of 0 is unknown."""

    position: Tensor
    time: Tensor


class Relations(NamedTuple):
    """How tokens stand to each other, as rows of the bias tables: INT64 `[B, rows, columns]` each."""

    distance: Tensor
    bucket: Tensor


class Block(nn.Module):
    """One layer. Its parts are called apart, because the user side and the item side need different ones."""

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 4 * width)  # K, V, Q, U
        self.position_bias = nn.Parameter(torch.empty(2 * longest + 1))
        self.time_bias = nn.Parameter(torch.empty(KNOWN_BUCKETS + 1))
        self.attention_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)

    def project_part(self, normed: Tensor, first: int, last: int) -> list[Tensor]:
        """Return parts `first` to `last` of K, V, Q, U of `[..., d]`: `[..., H, dh]` each."""
        width = normed.shape[-1]
        rows = slice(first * width, last * width)
        parts = nn.functional.silu(nn.functional.linear(normed, self.project.weight[rows], self.project.bias[rows]))
        return list(parts.view(*normed.shape[:-1], last - first, self.heads, width // self.heads).unbind(-3))

    def find_bias(self, relations: Relations) -> Tensor:
        """Return the bias of tokens against tokens: `[B, rows, columns]`."""
        return self.position_bias[relations.distance] + self.time_bias[relations.bucket]

    def close(self, tokens: Tensor, attended: Tensor, gate: Tensor) -> Tensor:
        """Add attention to the residual stream `[..., d]`; attended and gate: `[..., H, dh]`."""
        gated = self.attention_norm(attended.flatten(-2)) * gate.flatten(-2)
        return tokens + cast("Tensor", self.output(gated))


def attend_user(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Sum what the queries of all candidates find in one layer of user KV.

    rows: `[B, H, N·Q, dh+1]`, queries with a 1 behind them; keys: `[B, H, dh+1, L]`; values: `[B, H, L, dh]`. Returns
    `[B, H, N·Q, dh]`.
    """
    return nn.functional.silu(rows @ keys) @ values


def _attend_past(rows: tuple[Tensor], past: KV, made: KV) -> Tensor:  # noqa: ARG001 one signature for both sides of an If
    return attend_user(*rows, *past)


def _attend_made(rows: tuple[Tensor], past: KV, made: KV) -> Tensor:  # noqa: ARG001
    return attend_user(*rows, *made)


class HSTU(RankingNetwork):
    """HSTU ranker. Weights are shared by all three calls.

    The option `time_field` names the history field that holds an event's time, an integer in any unit, 0 if unknown;
    it is no category and has no embedding. Without it all times are unknown.
    """

    version = 1
    options = {"time_field": ""}  # noqa: RUF012 as the interface declares it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        network, schema = config.network, config.schema
        history = [field.name for field in schema.history_fields]
        self._time_field = str(self.get_option("time_field"))
        if self._time_field and self._time_field not in history:
            raise ConfigError(f"network.options.time_field: expected one of {history}, got {self._time_field!r}")
        vocabularies = {field.name: field.vocab_size for field in schema.history_fields + schema.candidate_fields}
        if self._time_field in [field.name for field in schema.candidate_fields] or history == [self._time_field]:
            raise ConfigError("network.options.time_field: expected a field of events alone, beside another one")
        vocabularies.pop(self._time_field, None)
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(size, network.width) for name, size in vocabularies.items()}
        )
        self.types = nn.Embedding(len(schema.candidate_fields), network.width)
        longest = config.limits.history
        self.blocks = nn.ModuleList(Block(network.width, network.heads, longest) for _ in range(network.layers))
        self.score_norm = nn.LayerNorm(network.width)
        self.score = nn.Linear(network.width, 1)
        self.register_buffer("buckets", list_buckets(), persistent=False)
        self._longest, self._scale = longest, 1 / math.sqrt(network.head_width)

    @property
    def kv_layout(self) -> KVLayout:
        """Keys with the items' bias under them, values divided by Lmax; padding is a slot of zeros: 0 is added."""
        network = self.config.network
        return KVLayout(
            layers=network.layers,
            heads=network.heads,
            key_rows=network.head_width + BIAS_ROWS,
            value_columns=network.head_width,
            lead_slots=0,
            mask_row=network.head_width,
            mask_value=0.0,
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights that keep every layer's output near unit size, so that all parts matter to a score."""
        for name, parameter in self.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("norm.weight"):
                parameter.mul_(0.1).add_(1)
            elif name.endswith(".bias"):
                parameter.mul_(0.1)
            elif name.endswith("_bias"):
                parameter.mul_(0.5)
            elif name.startswith(("blocks", "score")):
                parameter.mul_(1 / math.sqrt(parameter.shape[1]))

    def encode_user(self, history: Tensor) -> UserKV:
        """Encode histories INT64 `[B, L, history_fields]` into the user KV of every layer."""
        is_event = find_events(history)
        events, items = self._find_places(history, is_event)
        among_events, of_items = self._relate(events, events), self._relate(items, events)
        counts = (is_event / self._longest)[:, :, None, None]  # [B, L, 1, 1]: padding adds nothing to any sum
        tokens = self._embed_history(history)  # [B, L, d]
        keys, values = [], []
        for index, block in enumerate(self._get_blocks()):
            is_last = index == len(self.blocks) - 1
            key, value, *rest = block.project_part(block.norm(tokens), 0, 2 if is_last else 4)
            transposed, counted = (
                key.permute(0, 2, 3, 1),
                (value * counts).transpose(1, 2),
            )  # [B, H, dh, L], [B, H, L, dh]
            bias = (block.find_bias(of_items) * is_event[:, None]).unsqueeze(1)  # [B, 1, 1, L]
            keys.append(torch.cat([transposed, bias.expand(-1, block.heads, -1, -1)], dim=2))
            values.append(counted)
            if not is_last:
                query, gate = rest
                scores = (query * self._scale).transpose(1, 2) @ transposed + block.find_bias(among_events)[:, None]
                attended = nn.functional.silu(scores) @ counted  # [B, H, L, dh]
                tokens = block.close(tokens, attended.transpose(1, 2), gate)
        return UserKV(tuple(keys), tuple(values))

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        """Score candidates INT64 `[B, N, T]` against their user's KV: FP32 `[B, N]`."""
        return self._score(
            candidates, lambda index, rows: attend_user(rows, user_kv.keys[index], user_kv.values[index])
        )

    def rank(self, history: Tensor, candidates: Tensor, past: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        """Encode, and fuse with past or new KV: only the attention to it occurs twice in a graph."""
        made = self.encode_user(history)

        def attend(index: int, rows: Tensor) -> Tensor:
            layers = [(user_kv.keys[index], user_kv.values[index]) for user_kv in (past, made)]
            return cast("Tensor", choose(use_past, _attend_past, _attend_made, (rows,), *layers))

        return self._score(candidates, attend), made

    def _score(self, candidates: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Score candidates; `attend(layer, rows)` sums over the user what the query rows `[B, H, N·Q, dh+1]` find."""
        tokens = self._embed_candidates(candidates)  # [B, N, T, d]
        for index, block in enumerate(self._get_blocks()):
            normed = block.norm(tokens)
            key, value = block.project_part(normed, 0, 2)  # [B, N, T, H, dh]
            if index == len(self.blocks) - 1:
                tokens, normed = tokens[:, :, :1], normed[:, :, :1]  # the target token only
            query, gate = block.project_part(normed, 2, 4)  # [B, N, Q, H, dh]
            item_query = (query * self._scale).permute(0, 3, 1, 2, 4)  # [B, H, N, Q, dh]
            own_bias = block.position_bias[self._longest] + block.time_bias[0]  # one place, one time
            own = nn.functional.silu(item_query @ key.permute(0, 3, 1, 4, 2) + own_bias)  # [B, H, N, Q, T]
            own = own @ (value / self._longest).permute(0, 3, 1, 2, 4)  # [B, H, N, Q, dh]
            rows = torch.cat([item_query, torch.ones_like(item_query[..., :1])], dim=-1).flatten(2, 3)
            attended = own + attend(index, rows).view(own.shape)
            tokens = block.close(tokens, attended.permute(0, 2, 3, 1, 4), gate)
        return self._read_scores(tokens[:, :, 0])

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Score every candidate in a full sequence `[item tokens | history tokens]` of its own."""
        count, item_tokens = candidates.shape[1:]
        is_event = find_events(history)
        relations = self._relate_sequence(*self._find_places(history, is_event), item_tokens)
        # A factor and not a large negative bias: runtimes bound the sigmoid in silu from below.
        share = (make_monolith_mask(is_event, item_tokens, mask) == 0)[:, None] / self._longest  # [B, 1, 1, S, S]
        repeated = self._embed_history(history)[:, None].expand(-1, count, -1, -1)  # [B, N, L, d]
        tokens = torch.cat([self._embed_candidates(candidates), repeated], dim=2)  # [B, N, S, d], S = T + L
        user_keys = []
        for block in self._get_blocks():
            parts = block.project_part(block.norm(tokens), 0, 4)
            key, value, query, gate = (part.transpose(2, 3) for part in parts)  # [B, N, H, S, dh]
            user_keys.append(key[:, :, :, item_tokens:])
            scores = query @ key.transpose(3, 4) * self._scale + block.find_bias(relations)[:, None, None]
            attended = (nn.functional.silu(scores) * share) @ value
            tokens = block.close(tokens, attended.transpose(2, 3), gate.transpose(2, 3))
        return self._read_scores(tokens[:, :, 0]), tuple(user_keys)

    def _get_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _find_places(self, history: Tensor, is_event: Tensor) -> tuple[Places, Places]:
        """Return the places of events `[B, L]` and of items `[B, 1]`. A position counts real events only."""
        passed = is_event.long().cumsum(dim=1)  # [B, L]
        fields = [field.name for field in self.config.schema.history_fields]
        time = history[:, :, fields.index(self._time_field)] if self._time_field else torch.zeros_like(passed)
        nothing = history.new_zeros(history.shape[0], 1)  # for a history without any row
        latest = torch.cat([nothing, time], dim=1).amax(dim=1, keepdim=True)
        count = is_event.long().sum(dim=1, keepdim=True)
        return Places((passed - 1).clamp(min=0), time), Places(count, latest)

    def _relate(self, rows: Places, columns: Places) -> Relations:
        """Return how tokens at some places stand to tokens at others."""
        distance = rows.position[:, :, None] - columns.position[:, None, :] + self._longest
        difference = (rows.time[:, :, None] - columns.time[:, None, :]).abs().clamp(max=LONGEST_DIFFERENCE)
        buckets = self.get_buffer("buckets")[difference].long()  # looked up and not computed: a logarithm is rounded
        is_known = (rows.time > 0)[:, :, None] & (columns.time > 0)[:, None, :]
        return Relations(distance, torch.where(is_known, buckets, UNKNOWN_BUCKET))

    def _relate_sequence(self, events: Places, items: Places, item_tokens: int) -> Relations:
        """Return how the tokens of a sequence `[item tokens | history tokens]` stand to each other."""
        places = Places(
            torch.cat([items.position.expand(-1, item_tokens), events.position], dim=1),
            torch.cat([items.time.expand(-1, item_tokens), events.time], dim=1),
        )
        distance, bucket = self._relate(places, places)
        is_item = torch.arange(places.position.shape[1], device=bucket.device) < item_tokens
        return Relations(distance, torch.where(is_item[:, None] & is_item[None], 0, bucket))  # now is now, if unknown

    def _embed_history(self, history: Tensor) -> Tensor:
        """`[B, L, history_fields]` → `[B, L, d]`."""
        embedded = [
            self.embeddings[field.name](history[:, :, column])
            for column, field in enumerate(self.config.schema.history_fields)
            if field.name != self._time_field
        ]
        return cast("Tensor", sum(embedded[1:], start=embedded[0]))

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


def list_buckets() -> Tensor:
    """Return the bucket of each difference of times from 0 to `LONGEST_DIFFERENCE`: how many binary digits it has."""
    powers = 2 ** torch.arange(LONGEST_DIFFERENCE.bit_length())
    return torch.bucketize(torch.arange(LONGEST_DIFFERENCE + 1), powers, right=True).to(torch.uint8)

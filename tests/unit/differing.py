"""Networks that keep every property in torch and hide an operator that ONNX Runtime computes otherwise."""

import torch
from torch import Tensor, nn

from kvcast.networks.interface import MaskKind, RankingNetwork, UserKV
from kvcast.networks.masks import find_events
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.schema import KVLayout


class Plain(RankingNetwork):
    """One layer: candidates sum over the history by a sigmoid. Faults override `change_events` or `change_items`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        schema, width = config.schema, config.network.width
        sizes = {field.name: field.vocab_size for field in schema.history_fields + schema.candidate_fields}
        self.tables = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        self.key, self.value, self.query = (nn.Linear(width, width) for _ in range(3))
        self.score = nn.Linear(width, 1)

    @property
    def kv_layout(self) -> KVLayout:
        width = self.config.network.width
        return KVLayout(
            layers=1, heads=1, key_rows=width, value_columns=width, lead_slots=0, mask_row=0, mask_value=0.0
        )

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.normal_(0, 0.3, generator=generator)

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        """`[B, L, d]` → the same shape."""
        return tokens

    def change_items(self, tokens: Tensor) -> Tensor:
        """`[B, N, d]` → the same shape."""
        return tokens

    def encode_user(self, history: Tensor) -> UserKV:
        tokens = self.change_events(self.embed(history, self.config.schema.history_fields), history)
        value = self.value(tokens) * find_events(history)[..., None]
        return UserKV((self.key(tokens).transpose(1, 2)[:, None],), (value[:, None],))

    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        items = self.change_items(self.embed(candidates, self.config.schema.candidate_fields))
        found = torch.sigmoid(self.query(items) @ user_kv.keys[0][:, 0]) @ user_kv.values[0][:, 0] / 50
        return self.score(torch.tanh(items + found)).squeeze(-1)

    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        user_kv = self.encode_user(history)
        keys = user_kv.keys[0].transpose(2, 3)[:, None].expand(-1, candidates.shape[1], -1, -1, -1)
        return self.fuse(user_kv, candidates), (keys,)

    def embed(self, ids: Tensor, fields) -> Tensor:
        return sum(self.tables[field.name](ids[..., column]) for column, field in enumerate(fields))


class AddsExponentials(Plain):
    """Item side, large numbers: logaddexp."""

    def change_items(self, tokens: Tensor) -> Tensor:
        return torch.logaddexp(tokens, tokens.roll(1, dims=-1))


class TakesTheLogarithmOfASigmoid(Plain):
    """User side, large numbers: logsigmoid."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        return nn.functional.logsigmoid(tokens)


class MeansByAction(Plain):
    """User side, any request: scatter_reduce counts events of the same action."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        action = (history[..., 1] % 4)[..., None].expand_as(tokens)
        table = tokens.new_zeros(tokens.shape[0], 4, tokens.shape[2])
        means = table.scatter_reduce(1, action, tokens, "mean", include_self=False)
        return tokens + means.gather(1, action)


class TakesTheTopEvents(Plain):
    """User side, ties alone: which of two events of the same action is taken."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        popularity = torch.where(find_events(history), (history[..., 1] % 3).float(), -1.0)
        top = popularity.topk(1, dim=1).indices[..., None].expand(-1, -1, tokens.shape[2])
        return tokens + tokens.gather(1, top)


class SumsOverOlderEvents(Plain):
    """User side, one event alone: a sum over an axis of length 0."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        older = (tokens * find_events(history)[..., None])[:, :-1]
        return tokens + older.sum(dim=-2)[:, None] / 50


class AsksForOlderEvents(Plain):
    """User side, one event alone: whether any of none is true."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        has_older = find_events(history)[:, :-1].any(dim=1)
        return torch.where(has_older[:, None, None], 2 * tokens, tokens)


class Recurs(Plain):
    """A recurrent encoder, which is right: events are moved together first, so that padding is behind them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.reader = nn.GRU(config.network.width, config.network.width, batch_first=True)

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        is_event = find_events(history).long()  # [B, L]
        behind = is_event.sum(dim=1, keepdim=True) + (1 - is_event).cumsum(dim=1)
        place = torch.where(is_event == 1, is_event.cumsum(dim=1), behind)[..., None].expand_as(tokens) - 1
        return self.read(torch.zeros_like(tokens).scatter(1, place, tokens)).gather(1, place)

    def read(self, tokens: Tensor) -> Tensor:
        """`[B, L, d]` → the same shape."""
        return self.reader(tokens)[0]


class RecursInPython(Recurs):
    """The same in a loop, which a trace takes for as many events as it sees."""

    def read(self, tokens: Tensor) -> Tensor:
        state, states = torch.zeros_like(tokens[:, 0]), []
        for event in range(tokens.shape[1]):
            state = torch.tanh(state + tokens[:, event])
            states.append(state)
        return torch.stack(states, dim=1)


class SearchesASortedList(Plain):
    """User side: no operator of ONNX."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        return tokens + torch.searchsorted(torch.linspace(-1, 1, 8), tokens)


class AttendsWithoutHeads(Plain):
    """User side: the second attention has three dimensions."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        heads = tokens[:, None]
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)[:, 0]
        return attended + nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


class MasksWithInfinity(Plain):
    """User side, padding alone: a row of a softmax without keys."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        mask = torch.where(find_events(history), 0.0, -torch.inf)[:, None, None]
        attended = nn.functional.scaled_dot_product_attention(
            tokens[:, None], tokens[:, None], tokens[:, None], attn_mask=mask
        )
        return tokens + attended[:, 0]


class MasksWithBooleans(Plain):
    """User side, padding alone: as `MasksWithInfinity`, with a mask of booleans."""

    def change_events(self, tokens: Tensor, history: Tensor) -> Tensor:
        mask = find_events(history)[:, None, None]
        attended = nn.functional.scaled_dot_product_attention(
            tokens[:, None], tokens[:, None], tokens[:, None], attn_mask=mask
        )
        return tokens + attended[:, 0]

import torch
from torch import nn


class Taste(nn.Module):
    def __init__(self, items, categories, actions, width, divisor):
        super().__init__()
        self.item, self.category, self.action = (nn.Embedding(size, width) for size in (items, categories, actions))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.score = nn.Linear(width, 1)
        self.divisor = divisor

    def embed_events(self, history):  # [..., L, 2] → [..., L, d]
        return self.item(history[..., 0]) + self.action(history[..., 1])

    def embed_items(self, candidates):  # [..., 2] → [..., d]
        return self.item(candidates[..., 0]) + self.category(candidates[..., 1])

    def read(self, item, found):  # [..., d] and [..., d] → [...]
        return self.score(nn.functional.silu(item + found / self.divisor)).squeeze(-1)

    def forward(self, history, candidate):  # [R, L, 2] and [R, 2] → [R]
        events, item = self.embed_events(history), self.embed_items(candidate)
        share = torch.sigmoid(self.key(events) @ self.query(item)[..., None])  # [R, L, 1]
        share = share * (history != 0).any(-1, keepdim=True)  # an event of zeros is padding
        return self.read(item, (share * self.value(events)).sum(1))


from kvcast.protocol.schema import KVLayout
from kvcast.networks.interface import RankingNetwork, UserKV
from kvcast.networks.masks import find_events


class ServedTaste(RankingNetwork):
    options = {"divisor": 100}  # [network.options] in the TOML, and what they are without it

    def __init__(self, config):
        super().__init__(config)
        schema, width = config.schema, config.network.width
        size = {field.name: field.vocab_size for field in schema.history_fields + schema.candidate_fields}
        self.taste = Taste(size["item"], size["category"], size["action"], width, self.get_option("divisor"))

    @property
    def kv_layout(self):  # one layer, one head, keys [d, L], values [L, d]; padding is a slot of zeros: it adds 0
        width = self.config.network.width
        return KVLayout(
            layers=1, heads=1, key_rows=width, value_columns=width, lead_slots=0, mask_row=0, mask_value=0.0
        )

    def initialise(self, generator):  # for an export without weights
        for parameter in self.parameters():
            parameter.normal_(0, 0.3, generator=generator)

    def encode_user(self, history):  # once for a user: [B, L, 2] → keys [B, 1, d, L], values [B, 1, L, d]
        events = self.taste.embed_events(history)
        value = self.taste.value(events) * find_events(history)[..., None]
        return UserKV((self.taste.key(events).transpose(1, 2)[:, None],), (value[:, None],))

    def fuse(self, user_kv, candidates):  # for all candidates of a user at once: [B, N, 2] → [B, N]
        items = self.taste.embed_items(candidates)
        share = torch.sigmoid(self.taste.query(items) @ user_kv.keys[0][:, 0])  # [B, N, L]
        return self.taste.read(items, share @ user_kv.values[0][:, 0])

    def run_monolith(self, history, candidates, mask):  # as trained: the whole history again for every candidate
        users, count, _ = candidates.shape
        repeated = history[:, None].expand(-1, count, -1, -1)  # [B, N, L, 2]
        scores = self.taste(repeated.flatten(0, 1), candidates.flatten(0, 1))
        # In a single layer no event can have seen a candidate, whatever the mask. Keys: [B, N, heads, L, d].
        return scores.view(users, count), (self.taste.key(self.taste.embed_events(repeated))[:, :, None],)

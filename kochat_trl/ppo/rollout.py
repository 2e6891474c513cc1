"""A rollout: prompts → responses, and the rows that go through a model together.

Everything is counted by lengths, never by token ids, so a padding token in a response is a token like any other.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kochat_trl.models.heads import end_states
from kochat_trl.ppo.roles import Role

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MiniBatch = list[list[int]]  # the rows, of a rollout, of each of its micro-batches
NO_PADDING_ID = 0  # what stands under the mask; any id does


def seed_of(*parts: object) -> int:
    """A seed for a random generator, from what it is for: (seed, update, prompt), say. The same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()) >> 1


def shuffled(count: int, *what_for: object) -> list[int]:
    """The numbers below `count` in an order of their own, as `seed_of` tells from what it is for."""
    generator = torch.Generator().manual_seed(seed_of(*what_for))
    return torch.randperm(count, generator=generator).tolist()


def draw_prompts(prompts: int, batch_size: int, seed: int, update: int) -> list[int]:
    """The prompts of an update, by index: each pass over the data has an order of its own, and leaves a rest."""
    updates_a_pass = prompts // batch_size
    order = shuffled(prompts, seed, "order", update // updates_a_pass)
    start = update % updates_a_pass * batch_size
    return order[start : start + batch_size]


@torch.no_grad()
def sample_responses(
    policy: Role,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    response_length: int,
    temperature: float,
    stop_ids: Collection[int],
    batch_size: int,
) -> list[list[int]]:
    """Sample a response to each prompt (token ids) from softmax(logits / temperature), the whole of it; at 0 greedily.

    A response ends after one of `stop_ids`, part of it, or at `response_length` tokens. Each has a generator of its
    own, seeded by `seeds`, so it doesn't depend on the rows beside it (beyond rounding of the logits). Prompts of
    like length go together, `batch_size` at a time; where the model's cache allows it, a row that is finished leaves
    the batch and makes room for the next prompt. Every forward pass is one call of `next_logits`.
    """
    if not prompts:  # a process may have none
        return []
    responses: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    uniform = torch.stack([_uniform(seed, response_length) for seed in seeds]).to(policy.backbone.device)

    def is_done(row: int) -> bool:
        return len(responses[row]) == response_length or any(token in stop_ids for token in responses[row][-1:])

    running: _Running | None = None
    with policy.active(), without_checkpointing(policy.backbone):
        while waiting or running:  # a forward pass each time
            free = batch_size - (len(running.rows) if running else 0)
            beside = running if waiting and running and running.can_join and REFILL * free >= batch_size else None
            if beside or not running:
                rows, waiting = waiting[:free], waiting[free:]
                running, logits = _Running.read(policy, rows, [prompts[row] for row in rows])
            else:
                logits = next_logits(policy, running.ids, running.mask, running.cache)
            steps = [min(len(responses[row]), response_length - 1) for row in running.rows]
            tokens = draw(logits, uniform[running.rows, steps, None], temperature)
            del logits  # or they stood beside the next ones
            for row, token in zip(running.rows, tokens.squeeze(1).tolist(), strict=True):
                if not is_done(row):
                    responses[row].append(token)
            running.add(tokens)
            running = running.without([is_done(row) for row in running.rows])
            running = beside.join(running) if beside and running else running or beside
    return responses


REFILL = 4  # newcomers are read when 1/4 of the rows are free: a pass over a few prompts takes as long as over many


class Growing(DynamicLayer):
    """Keys and values of full attention in buffers with room for `ROOM` more tokens, in place of a copy for each."""

    ROOM = 16
    buffers: Any = None  # two, (n, heads, length + room, width); None after rows or columns left

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length, new = self.get_seq_length(), (key_states, value_states)
        total = length + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < total:
            self.buffers = [x.new_empty(*x.shape[:2], total + self.ROOM, x.shape[-1]) for x in new]
            for buffer, old in zip(self.buffers, (self.keys, self.values) if length else (), strict=False):
                buffer[..., :length, :] = old
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[..., length:total, :] = x
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None


def new_cache(policy: Role) -> DynamicCache:
    """An empty cache of keys and values, and of whatever else the model's layers keep."""
    cache = DynamicCache(config=policy.backbone.config)
    cache.layers = [Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class _Running:
    """n rows that are being answered together, aligned at the right: the last token of each is not in the cache yet."""

    rows: list[int]
    ids: Tensor  # (n, 1)
    mask: Tensor  # (n, length), 1 on tokens
    cache: DynamicCache

    @classmethod
    def read(cls, policy: Role, rows: list[int], prompts: Sequence[Sequence[int]]) -> "tuple[_Running, Tensor]":
        """Prompts, and the logits of their first tokens. A prompt that is there several times is read once."""
        device, cache = policy.backbone.device, new_cache(policy)
        made = cls(rows, torch.empty(0), torch.empty(0), cache)
        read = list(dict.fromkeys(map(tuple, prompts))) if made.can_leave else prompts
        ids, made.mask = _padded(read, "left", device)
        logits = next_logits(policy, ids, made.mask, cache)
        if len(read) < len(prompts):
            of_prompt = {prompt: i for i, prompt in enumerate(read)}
            spread_out = torch.tensor([of_prompt[tuple(prompt)] for prompt in prompts], device=device)
            logits, made.mask = logits[spread_out], made.mask[spread_out]
            cache.batch_select_indices(spread_out)
        return made, logits

    @property
    def can_leave(self) -> bool:
        return all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers)  # not convolutions (LFM2)

    @property
    def can_join(self) -> bool:
        return all(type(layer) in (Growing, DynamicSlidingWindowLayer) for layer in self.cache.layers)

    def add(self, tokens: Tensor) -> None:
        """A token to each row, (n, 1)."""
        self.ids, self.mask = tokens, torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)

    def without(self, done: list[bool]) -> "_Running | None":
        """The rows that aren't done, or where rows can't leave, all until the last is done."""
        if all(done):
            return None
        if any(done) and self.can_leave:
            going = [i for i, is_done in enumerate(done) if not is_done]
            keep = torch.tensor(going, device=self.mask.device)
            self.rows, self.ids, self.mask = [self.rows[i] for i in going], self.ids[keep], self.mask[keep]
            self.cache.batch_select_indices(keep)
        return self

    def join(self, newcomers: "_Running") -> "_Running":
        """Both, side by side, in as many columns as the longest row has tokens."""
        both = (self, newcomers)
        width = max(int(part.mask.sum(1).max()) for part in both)
        self.rows += newcomers.rows
        self.ids = torch.cat([part.ids for part in both])
        self.mask = torch.cat([_to_width(part.mask[..., None], width)[..., 0] for part in both])
        layers: Any
        for layers in zip(self.cache.layers, newcomers.cache.layers, strict=True):
            layer, length = layers[0], width - 1
            if not layer.is_initialized:  # it reads the keys and values of another
                continue
            if layer.is_sliding:
                layer.cumulative_length, length = length, min(length, layer.sliding_window - 1)
            layer.keys = torch.cat([_to_width(one.keys, length) for one in layers])
            layer.values = torch.cat([_to_width(one.values, length) for one in layers])
            layer.buffers = None
        return self


def _to_width(x: Tensor, width: int) -> Tensor:
    """`x` with `width` places in its last dimension but one: zeros are added, or places left out, at the left."""
    return F.pad(x, (0, 0, width - x.shape[-2], 0))


def _padded(rows: Sequence[Sequence[int]], side: str, device: Any) -> tuple[Tensor, Tensor]:
    """Ids of rows, padded on a side to the longest, and a mask that is 1 on them; both (rows, length)."""
    ids = [torch.tensor(row) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=NO_PADDING_ID, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)


def next_logits(policy: Role, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """The logits of the token after each row of `ids`, (n, vocabulary); `mask` covers the cache and `ids`."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = policy.backbone(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return policy.head(output.last_hidden_state[:, -1])


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A token for each row of `logits`, (n, 1), drawn by `uniform` (n, 1), or with a temperature of 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # The token where the running sum of probabilities passes a uniform number.
    running = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def without_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off, under which transformers keeps no cache of keys and values."""
    layers = [m for m in backbone.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


@dataclass
class Rollout:
    """b prompts with their responses of at most t tokens."""

    prompts: list[list[int]]
    responses: list[list[int]]
    tokens: Tensor  # (b, t), the responses, padded on the right
    mask: Tensor  # (b, t), True on the tokens of a response
    value_mask: Tensor  # (b, t), True on the states whose value counts: as `mask`, or one more with `score_after_eos`
    ended: Tensor  # (b,), whether a response ended itself

    @classmethod
    def of(
        cls,
        prompts: list[list[int]],
        responses: list[list[int]],
        response_length: int,
        stop_ids: Collection[int],
        score_after_eos: bool,
        device: Any,
    ) -> "Rollout":
        lengths = torch.tensor([len(response) for response in responses])
        width = min(int(lengths.max()) + score_after_eos, response_length)
        columns = torch.arange(width)
        tokens = torch.full((len(responses), width), NO_PADDING_ID)
        for row, response in enumerate(responses):
            tokens[row, : len(response)] = torch.tensor(response)
        mask = columns < lengths[:, None]
        value_mask = columns < lengths[:, None] + score_after_eos
        ended = torch.tensor([response[-1] in stop_ids for response in responses])
        tensors = (tensor.to(device) for tensor in (tokens, mask, value_mask, ended))
        return cls(prompts, responses, *tensors)

    def plan(self, mini: int, micro: int, seed: int, update: int, epoch: int) -> list[MiniBatch]:
        """The mini-batches, of `mini` rows, of an epoch, each in micro-batches of `micro`; for all processes together.

        Rows are shuffled into mini-batches; within one, those of like length go together. The plan of the first epoch
        also serves to score the rollout, so that the first step computes the very numbers that it compares with.
        """
        lengths = [len(text) for text in map(list.__add__, self.prompts, self.responses)]
        order = shuffled(len(lengths), seed, "rows", update, epoch)
        mini_batches = [sorted(order[i : i + mini], key=lengths.__getitem__) for i in range(0, len(order), mini)]
        return [[rows[i : i + micro] for i in range(0, mini, micro)] for rows in mini_batches]

    def micro_batch(self, rows: Sequence[int]) -> "MicroBatch":
        """Prompts and responses of some rows, joined, and padded on the right to the longest."""
        device = self.tokens.device
        ids, mask = _padded([self.prompts[row] + self.responses[row] for row in rows], "right", device)
        starts = torch.tensor([len(self.prompts[row]) - 1 for row in rows], device=device)
        return MicroBatch(torch.tensor(rows, device=device), ids, mask, starts)


@dataclass
class MicroBatch:
    """Rows of a rollout that go through a model together."""

    rows: Tensor  # (m,), their places in the rollout
    input_ids: Tensor  # (m, length), padded on the right
    attention_mask: Tensor  # (m, length), 1 on tokens
    starts: Tensor  # (m,), the last position of each prompt: the first token of the response is drawn from its state

    def hidden(self, role: Role) -> Tensor:
        return role.hidden(self.input_ids, self.attention_mask)

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The hidden states that belong to the True of `mask` (m, t), a row for each: column t is the state in which
        token t of the response is chosen."""
        row, column = mask.nonzero(as_tuple=True)
        return hidden[row, self.starts[row] + column]

    def end_states(self, hidden: Tensor) -> Tensor:
        """The hidden states that the reward is read from, (m, hidden_size)."""
        return end_states(hidden, self.attention_mask)


class PolicyPass(NamedTuple):
    """What a forward pass of the policy says of m rows, with its gradients' graph if there is one."""

    logprobs: Tensor  # (m, t), of the responses, 0 under the mask
    entropies: Tensor  # (n,), one for each of the n tokens of the responses
    hidden: Tensor  # (m, length, hidden_size)


class Kept(NamedTuple):
    """What policy and value function said of m rows while they were scored, with their gradients' graphs."""

    policy: PolicyPass
    values: Any  # (m, t), or None


@dataclass
class Trajectory:
    """What the four models say of a rollout, and what PPO makes of it; floats, and 0 where there is no token.

    log-probabilities are in nats a token, of softmax(logits / temperature).
    """

    logprobs: Tensor  # (b, t), under the policy that sampled
    ref_logprobs: Tensor  # (b, t), under the reference
    values: Tensor  # (b, t), V of the state in which token t is chosen
    scores: Tensor  # (b,), the reward model's, and of reward functions their weighted sum on top
    kept: Kept | None = field(init=False, default=None)  # for the first step on the rollout, until it is taken
    rewards: dict[str, Tensor] = field(init=False, default_factory=dict)  # (b,) of each, where there are functions
    advantages: Tensor = field(init=False)  # (b, t), set once there are rewards
    returns: Tensor = field(init=False)  # (b, t)

    @classmethod
    def zeros(cls, shape: Sequence[int], device: Any, dtype: torch.dtype) -> "Trajectory":
        """A trajectory of `shape` (b, t) of which nothing is known."""
        shapes = (shape, shape, shape, shape[:1])
        return cls(*(torch.zeros(*each, device=device, dtype=dtype) for each in shapes))

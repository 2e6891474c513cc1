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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

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
    like length go together, `batch_size` at a time, and a row that is finished leaves the batch where it can.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with policy.active(), without_checkpointing(policy.backbone):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            uniform = torch.stack([_uniform(seeds[row], response_length) for row in rows])
            sampled = _sample_batch(policy, [prompts[row] for row in rows], uniform, temperature, stop_ids)
            for row, response in zip(rows, sampled, strict=True):
                responses[row] = response
    return responses


def _sample_batch(
    policy: Role, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float, stop_ids: Collection[int]
) -> list[list[int]]:
    device = policy.backbone.device
    uniform = uniform.to(device)
    cache = DynamicCache(config=policy.backbone.config)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # in the batch
    done: set[int] = set()
    can_leave = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)  # not from convolutions (LFM2)
    # The answers of a group stand after one prompt, which is read once.
    read = list(dict.fromkeys(map(tuple, prompts))) if can_leave else prompts
    ids, mask = _padded(read, "left", device)
    for step in range(uniform.shape[1]):
        logits = next_logits(policy, ids, mask, cache)
        if step == 0 and len(read) < len(prompts):
            of_prompt = {prompt: i for i, prompt in enumerate(read)}
            spread_out = torch.tensor([of_prompt[tuple(prompt)] for prompt in prompts], device=device)
            logits, mask = logits[spread_out], mask[spread_out]
            cache.batch_select_indices(spread_out)
        tokens = draw(logits, uniform[rows, step, None], temperature)
        del logits  # or they stood beside the next ones
        chosen = tokens.squeeze(1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            if row not in done:
                responses[row].append(token)
        done |= {row for row, token in zip(rows, chosen, strict=True) if token in stop_ids}
        going = [i for i, row in enumerate(rows) if row not in done]
        if not going:
            break
        ids, mask = tokens, torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        if can_leave and len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            ids, mask, rows = ids[keep], mask[keep], [rows[i] for i in going]
            cache.batch_select_indices(keep)
    return responses


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

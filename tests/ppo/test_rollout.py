"""Sampling against a loop without cache or batches, and scoring against one row at a time without padding."""

from statistics import mode

from kochat_trl.models.heads import lm_head
from kochat_trl.ppo import rollout
from kochat_trl.ppo.roles import Role, separate_models
from kochat_trl.ppo.rollout import MicroBatch, Rollout, sample_responses, seed_of
from kochat_trl.ppo.step import score_rollout, spread
from tests.tiny import gpt2_config

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

VOCAB, STOP, LENGTH = 24, 1, 6
SHAPES = {
    "gpt2": gpt2_config(
        VOCAB, num_labels=1, initializer_range=0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=STOP, eos_token_id=STOP,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, num_labels=1, initializer_range=0.5,
    ),
}  # fmt: skip
PROMPTS = [[5, 9, 7, 20], [3], [8, 0, 2, 4, 11, 6, 0], [21, 4], [5, 9, 7, 20], [13, 2, 1]]
SEEDS = [101, 102, 103, 104, 105, 106]

kinds = pytest.mark.parametrize("kind", SHAPES)


def causal_lm(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(SHAPES[kind]).eval()


def classifier(kind, seed):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(SHAPES[kind]).eval()


def role_of(model) -> Role:
    return Role(model, model.get_output_embeddings(), None)


def sample(policy, prompts=PROMPTS, seeds=SEEDS, length=LENGTH, temperature=1.0, stop=(STOP,), batch_size=64):
    return sample_responses(policy, prompts, seeds, length, temperature, stop, batch_size)


@torch.no_grad()
def chances(model, text, temperature):
    logits = model(input_ids=torch.tensor([text])).logits[0, -1]
    return (logits.double() / temperature).softmax(-1)


def naive_sample(model, prompts=PROMPTS, seeds=SEEDS, temperature=1.0):
    """LENGTH tokens to each prompt, one forward pass over the whole text for each."""
    responses = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        response = []
        for number in torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64):
            running = chances(model, prompt + response, temperature).cumsum(-1)
            response.append(int(torch.searchsorted(running, number * running[-1])))
        responses.append(response)
    return responses


# Sampling.


def cut(response, stop):
    return response[: response.index(stop) + 1] if stop in response else response


@kinds
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_equal_the_loop(kind, temperature):
    model = causal_lm(kind)
    prompts, seeds = PROMPTS * 3, [seed_of(kind, i) for i in range(len(PROMPTS) * 3)]
    expected = naive_sample(model, prompts, seeds, temperature)
    assert sample(role_of(model), prompts, seeds, temperature=temperature, stop=(), batch_size=7) == expected
    stop = mode(token for response in expected for token in response)
    ours = sample(role_of(model), prompts, seeds, temperature=temperature, stop=[stop], batch_size=7)
    assert ours == [cut(response, stop) for response in expected]
    assert len({len(response) for response in ours}) > 2


def test_no_prompts_have_no_responses():
    """A process may have none, of few that are evaluated on."""
    assert sample(role_of(causal_lm("gpt2")), [], []) == []


@kinds
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_a_response_does_not_depend_on_the_rows_beside_it(kind, batch_size):
    policy = role_of(causal_lm(kind))
    alone = [sample(policy, [p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert sample(policy, batch_size=batch_size) == alone
    assert sample(policy, PROMPTS[::-1], SEEDS[::-1], batch_size=batch_size) == alone[::-1]
    assert alone[0] != alone[4]  # one prompt, two seeds


@kinds
@pytest.mark.parametrize("length", [1, 3, 10])
def test_a_response_ends_with_the_stop_token_or_at_its_length(kind, length):
    prompts, seeds = [[5]] * 300, range(300)
    responses = sample(role_of(causal_lm(kind)), prompts, seeds, length=length)
    for response in responses:
        assert STOP not in response[:-1]
        assert len(response) == length or response[-1] == STOP
    assert any(response[-1] == STOP for response in responses)
    longer = sample(role_of(causal_lm(kind)), prompts, seeds, length=length, stop=())
    assert all(response == other[: len(response)] for response, other in zip(responses, longer, strict=True))


def calls_of(model):
    """The shape of what goes through the backbone in each call from here on."""
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@kinds
def test_rows_that_are_finished_leave_the_batch(kind):
    model = causal_lm(kind)
    shapes = calls_of(model)
    lengths = [len(response) for response in sample(role_of(model), PROMPTS * 5, range(30))]
    left = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert [rows for rows, _ in shapes] == [5, *left[1:]]  # different prompts, and then answers
    assert len(set(left)) > 2
    assert [width for _, width in shapes] == [7] + [1] * (len(left) - 1)


@kinds
def test_a_prompt_with_several_answers_is_read_once(kind):
    model = causal_lm(kind)
    shapes = calls_of(model)
    sample(role_of(model), [PROMPTS[0]] * 3 + [PROMPTS[2]] * 2, SEEDS[:5], stop=())
    assert shapes == [(2, 7)] + [(5, 1)] * (LENGTH - 1)


def test_a_row_that_ends_makes_room_for_the_next_prompt(monkeypatch):
    """Four rows: a quarter of them free is reason enough to read on, and the widest row sets the width."""
    model, prompts, seeds = causal_lm("gpt2"), [[5] * (2 + i % 5) for i in range(24)], range(24)
    expected = naive_sample(model, prompts, seeds)
    stop = mode(token for response in expected for token in response)
    shapes = calls_of(model)
    assert sample(role_of(model), prompts, seeds, stop=[stop], batch_size=4) == [cut(x, stop) for x in expected]
    rows = [rows for rows, width in shapes if width == 1]
    lengths = [len(cut(x, stop)) for x in expected]
    assert sum(rows) == sum(lengths) - len(prompts)  # first tokens are drawn where prompts are read
    assert set(rows[:-LENGTH]) == {4}  # full until the last prompts are there
    monkeypatch.setattr(rollout, "REFILL", 1)  # batch after batch
    shapes.clear()
    sample(role_of(model), prompts, seeds, stop=[stop], batch_size=4)
    assert len([1 for _, width in shapes if width == 1]) > len(rows)


def test_nothing_is_computed_after_the_last_stop_token():
    model = causal_lm("gpt2")
    stop = naive_sample(model, [[3]], [102])[0][0]
    shapes = calls_of(model)
    assert sample(role_of(model), [[3]], [102], stop=[stop]) == [[stop]]
    assert len(shapes) == 1


def test_prompts_of_like_length_go_together():
    model = causal_lm("gpt2")
    shapes = calls_of(model)
    sample(role_of(model), length=1, batch_size=2)
    assert shapes == [(2, 2), (2, 4), (2, 7)]


@kinds
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_frequencies_are_the_chances(kind, temperature):
    """Of the first token, and of the second whatever the first was: within 4.5 sigma of 20,000 draws."""
    model, draws = causal_lm(kind), 20_000
    seeds = [seed_of("frequencies", i) for i in range(draws)]
    tokens = torch.tensor(sample(role_of(model), [[5, 9]] * draws, seeds, 2, temperature, (), draws))
    first = chances(model, [5, 9], temperature)
    second = sum(first[token] * chances(model, [5, 9, token], temperature) for token in range(VOCAB))
    other = chances(model, [5, 9], temperature * 1.2)  # which these are not

    def fits(column, expected):
        found = tokens[:, column].bincount(minlength=VOCAB)
        sigma = (draws * expected * (1 - expected)).sqrt()
        return bool(((found - draws * expected).abs() <= 4.5 * sigma + 1).all())

    assert (fits(0, first), fits(1, second), fits(0, other)) == (True, True, False)


def forced(monkeypatch, number, logits):
    """The token that the uniform number draws from these logits."""
    model = causal_lm("gpt2")
    monkeypatch.setattr(rollout, "_uniform", lambda seed, count: torch.full((count,), number, dtype=torch.float64))
    head = torch.nn.Linear(16, len(logits))
    head.weight.data.zero_()
    head.bias.data = torch.tensor(logits)
    return sample(Role(model, head, None), [[5]], [0], 1)[0][0]


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1.0 - 2**-53, 4)]
)
def test_the_token_under_a_number_by_hand(monkeypatch, number, token):
    """Chances 0, 1/4, 0, 1/2, 1/4: a token without a chance is never drawn."""
    logits = [-1e9, 0.0, -1e9, 0.6931472, 0.0]
    assert forced(monkeypatch, number, logits) == token


def test_rounding_never_draws_a_token_beyond_the_last(monkeypatch):
    assert forced(monkeypatch, 1.0, [0.0, 0.0, 0.0]) == 2


@kinds
def test_gradient_checkpointing_changes_no_sample(kind):
    model = causal_lm(kind)
    expected = sample(role_of(model))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    layers[-1].gradient_checkpointing = False
    before = [layer.gradient_checkpointing for layer in layers]
    assert sample(role_of(model)) == expected
    assert [layer.gradient_checkpointing for layer in layers] == before
    with pytest.raises(IndexError):  # no such word
        sample(role_of(model), [[VOCAB]], [0])
    assert [layer.gradient_checkpointing for layer in layers] == before
    assert any(before)


@kinds
def test_samples_of_an_adapter_equal_the_loop(kind):
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}[kind]
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2", init_lora_weights=False)
    base = sample(role_of(causal_lm(kind)), stop=())
    model = get_peft_model(causal_lm(kind), config)
    ours = sample(Role(model, lm_head(model), "default"), stop=())
    assert ours == naive_sample(model)
    assert ours != base


def test_seeds_are_the_same_everywhere():
    assert seed_of(42, "sample", 3, 7) == 1328829511962127390
    assert seed_of() == 8238016292129134938


def test_seeds_differ():
    seeds = {seed_of(seed, what, i) for seed in range(3) for what in ("sample", "rows") for i in range(2000)}
    assert len(seeds) == 12_000
    assert seed_of(1, 23) != seed_of(12, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


# The rollout's tensors.


def rollout_of(responses, length=4, stop=(STOP,), score_after_eos=False, prompts=None):
    prompts = prompts or [[5 + i] * (i + 1) for i in range(len(responses))]
    return Rollout.of(prompts, responses, length, stop, score_after_eos, "cpu")


def ones(*lengths, width):
    return [[column < length for column in range(width)] for length in lengths]


def test_a_rollout_by_hand():
    """The id that stands for padding, 0, is a token like any other, also at the end."""
    made = rollout_of([[3, 0, STOP], [4, 0], [STOP]])
    assert made.tokens.tolist() == [[3, 0, 1], [4, 0, 0], [1, 0, 0]]
    assert made.mask.tolist() == made.value_mask.tolist() == ones(3, 2, 1, width=3)
    assert made.ended.tolist() == [True, False, True]
    assert (made.prompts, made.responses[1]) == ([[5], [6, 6], [7, 7, 7]], [4, 0])


def test_a_state_more_with_score_after_eos():
    made = rollout_of([[3, 0, STOP], [4, STOP], [STOP]], score_after_eos=True)
    assert made.tokens.tolist() == [[3, 0, 1, 0], [4, 1, 0, 0], [1, 0, 0, 0]]
    assert made.mask.tolist() == ones(3, 2, 1, width=4)
    assert made.value_mask.tolist() == ones(4, 3, 2, width=4)


def test_no_state_after_a_response_that_is_cut():
    made = rollout_of([[3, 0, 2, 2], [4, STOP], [3, 3, 3, STOP]], score_after_eos=True)
    assert made.mask.tolist() == ones(4, 2, 4, width=4)
    assert made.value_mask.tolist() == ones(4, 3, 4, width=4)
    assert made.ended.tolist() == [False, True, True]


def test_without_a_stop_token_no_response_ends():
    assert not rollout_of([[3, 1], [4, 0]], length=2, stop=()).ended.any()


def test_a_micro_batch_by_hand():
    made = rollout_of([[3, 0, STOP], [4, 0], [STOP]])
    batch = made.micro_batch([2, 0])
    assert batch.rows.tolist() == [2, 0]
    assert batch.input_ids.tolist() == [[7, 7, 7, 1], [5, 3, 0, 1]]
    assert batch.starts.tolist() == [2, 0]
    batch = made.micro_batch([0, 1, 2, 0])
    assert batch.input_ids.tolist() == [[5, 3, 0, 1], [6, 6, 4, 0], [7, 7, 7, 1], [5, 3, 0, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1]] * 4
    batch = rollout_of([[3, 0], [STOP]], prompts=[[9, 8, 0], [7]]).micro_batch([1, 0])
    assert batch.input_ids.tolist() == [[7, 1, 0, 0, 0], [9, 8, 0, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.starts.tolist() == [0, 2]


def test_states_by_hand():
    """Position p of row r has the state 10r + p."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    batch = MicroBatch(torch.tensor([4, 2]), torch.zeros(2, 6), mask, torch.tensor([2, 0]))
    hidden = (10.0 * torch.arange(2)[:, None] + torch.arange(6))[..., None].repeat(1, 1, 3)
    chosen = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.tensor([2.0, 3.0, 10.0, 11.0, 12.0])
    assert torch.equal(batch.states(hidden, chosen), expected[:, None].repeat(1, 3))
    assert torch.equal(batch.end_states(hidden), torch.tensor([4.0, 12.0])[:, None].repeat(1, 3))


def test_spread_by_hand():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    found = spread(torch.tensor([1.0, 2.0, 3.0]), mask, torch.float64)
    assert found.tolist() == [[1, 0, 2], [0, 3, 0]]
    assert found.dtype == torch.float64


# Scoring.

RESPONSES = [[3, 0, 7], [STOP], [0, 0, 0, 0, 0, 0], [2, 4, 4, 4, STOP], [6, 9, 0, STOP], [11, 0]]
BATCHES = [[4, 1, 2], [0], [5, 3]]


def models(kind, value_model):
    value = classifier(kind, 3) if value_model == "separate" else None
    roles = separate_models(causal_lm(kind, 0), causal_lm(kind, 1), classifier(kind, 2), value)
    if value is None:
        torch.nn.init.normal_(roles.value.head.weight)
    return roles.double().eval()


def score(roles, made, batches=BATCHES, temperature=0.7, dtype=torch.float64):
    """What is set of a trajectory, by name."""
    scored = score_rollout(roles, made, [made.micro_batch(rows) for rows in batches], temperature, dtype)
    return {name: numbers for name, numbers in vars(scored).items() if name != "rewards"}  # functions', set later


@torch.no_grad()
def naive_score(roles, made, temperature, extra):
    """One row at a time, through whole models."""
    width = made.mask.shape[1]
    names = {"logprobs": "policy", "ref_logprobs": "reference"}
    found = {name: torch.zeros(len(made.responses), width).double() for name in (*names, "values")}
    found["scores"] = torch.zeros(len(made.responses)).double()
    for row, (prompt, response) in enumerate(zip(made.prompts, made.responses, strict=True)):
        ids = torch.tensor([prompt + response])
        for name, model in names.items():
            logits = roles.models[model](input_ids=ids).logits[0] / temperature
            for t, token in enumerate(response):
                found[name][row, t] = logits[len(prompt) - 1 + t].log_softmax(0)[token]
        source = roles.models["value"].base_model if "value" in roles.models else roles.models["policy"].base_model
        weight = roles.models["value"].score.weight if "value" in roles.models else roles.models["value_head"].weight
        values = (source(input_ids=ids).last_hidden_state[0] @ weight.T)[:, 0]
        for t in range(min(len(response) + extra, width)):
            found["values"][row, t] = values[len(prompt) - 1 + t]
        reward = roles.models["reward"]
        found["scores"][row] = (reward.base_model(input_ids=ids).last_hidden_state[0, -1] @ reward.score.weight.T)[0]
    return found


@kinds
@pytest.mark.parametrize("value_model", ["separate", "shared"])
@pytest.mark.parametrize("score_after_eos", [False, True])
def test_scores_equal_those_of_each_row_alone(kind, value_model, score_after_eos):
    roles = models(kind, value_model)
    assert roles.value_reads_policy == (value_model == "shared")
    made = rollout_of(RESPONSES, LENGTH, score_after_eos=score_after_eos, prompts=PROMPTS)
    ours, expected = score(roles, made), naive_score(roles, made, 0.7, int(score_after_eos))
    assert set(ours) == set(expected)
    for name, numbers in expected.items():
        torch.testing.assert_close(ours[name], numbers, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert (ours["logprobs"] - ours["ref_logprobs"]).abs().max() > 0.1
    assert (ours["logprobs"] != 0).equal(made.mask)
    assert (ours["values"] != 0).equal(made.value_mask)


def test_rows_that_are_in_no_batch_are_0():
    roles = models("gpt2", "separate")
    made = rollout_of(RESPONSES, LENGTH, prompts=PROMPTS)
    whole, part = score(roles, made), score(roles, made, [[4], [1, 2]])
    for name, numbers in part.items():
        torch.testing.assert_close(numbers[[1, 2, 4]], whole[name][[1, 2, 4]], rtol=0, atol=1e-12)
        assert not numbers[[0, 3, 5]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_come_in_the_dtype_asked_for(dtype):
    made = rollout_of(RESPONSES, LENGTH, prompts=PROMPTS)
    for value_model in ("separate", "shared"):
        found = score(models("gpt2", value_model), made, dtype=dtype)
        assert {numbers.dtype for numbers in found.values()} == {dtype}
        assert not any(numbers.requires_grad for numbers in found.values())


@kinds
@pytest.mark.parametrize("poison", [STOP, 17, VOCAB - 1])
def test_what_stands_under_the_mask_is_never_read(kind, poison, monkeypatch):
    model, roles = causal_lm(kind), models(kind, "separate")

    def everything():
        made = rollout_of(RESPONSES, LENGTH, score_after_eos=True, prompts=PROMPTS)
        padded = torch.cat((made.tokens.flatten(), made.micro_batch([0, 1]).input_ids.flatten()))
        return made, padded.tolist(), sample(role_of(model)), score(roles, made)

    clean, padding, expected, scored = everything()
    monkeypatch.setattr(rollout, "NO_PADDING_ID", poison)
    made, other_padding, samples, found = everything()
    assert samples == expected
    assert other_padding.count(poison) > padding.count(poison) + 10
    for name in ("mask", "value_mask", "ended"):
        assert torch.equal(getattr(made, name), getattr(clean, name))
    for name, numbers in scored.items():
        assert torch.equal(found[name], numbers)

"""PPO's rewards and advantages against arithmetic by hand, float64 loops, and the lines of TRL's PPOTrainer."""

from math import log

from kochat_trl.ppo.objective import (
    RunningMoments,
    entropy,
    final_scores,
    gae,
    grpo_advantages,
    grpo_losses,
    kl_estimate,
    masked_mean,
    next_kl_coef,
    policy_losses,
    rloo_advantages,
    sequence_losses,
    token_rewards,
    value_losses,
    whiten,
)
from tests.ppo.numbers import LENGTHS, LN2, MASK, mask_of, random, same, table

import pytest
import torch
from torch.autograd import gradcheck
from trl.experimental.ppo import ppo_trainer as trl

POISONS = [float("nan"), float("inf"), -float("inf"), 1e30]


# Means and whitening.


def test_masked_mean_by_hand():
    values, mask = table([1, 2, 90], [6, 90, 90]), mask_of((2, 1), 3)
    assert masked_mean(values, mask).item() == 3.0  # (1 + 2 + 6)/3
    values = random(4, 7)
    same(masked_mean(values, MASK), trl.masked_mean(values, MASK))


def test_whiten_by_hand():
    """1, 3, 5: mean 3, variance (4 + 0 + 4)/2 = 4."""
    values, mask = table([1, 3, 90], [5, 90, 90]), mask_of((2, 1), 3)
    same(whiten(values, mask), table([-1, 0, 0], [1, 0, 0]), rtol=1e-8, atol=1e-8)
    same(whiten(values, mask, shift_mean=False), table([2, 3, 0], [4, 0, 0]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])  # at 1e-4, the 1e-8 inside the root is as large as the variance
def test_whiten_equals_trl(scale, shift_mean):
    values = scale * (random(4, 7) + 2)
    ours, theirs = whiten(values, MASK, shift_mean), trl.masked_whiten(values, MASK, shift_mean)
    same(ours, theirs.masked_fill(~MASK, 0), rtol=1e-7, atol=1e-7)  # TRL divides the counts in float32


def test_whitened_values_have_mean_0_and_variance_1():
    values = 3 * random(4, 7) + 5
    whitened = whiten(values, MASK)
    same(whitened[MASK].mean(), 0)
    same(whitened[MASK].var(), 1, rtol=1e-8, atol=0)
    same(whiten(values, MASK, shift_mean=False)[MASK].mean(), values[MASK].mean())
    assert (whitened[~MASK] == 0).all()


# KL.


def test_kl_estimates_by_hand():
    """π = 1/2, π_ref = 1/4: d = ln 2; and the other way round: d = −ln 2."""
    logprobs, ref_logprobs = table([log(1 / 2), log(1 / 4)]), table([log(1 / 4), log(1 / 2)])
    same(kl_estimate(logprobs, ref_logprobs), table([LN2, -LN2]))
    same(kl_estimate(logprobs, ref_logprobs, "k1"), table([LN2, -LN2]))
    same(kl_estimate(logprobs, ref_logprobs, "k2"), table([LN2**2 / 2, LN2**2 / 2]))
    same(kl_estimate(logprobs, ref_logprobs, "k3"), table([1 / 2 - 1 + LN2, 2 - 1 - LN2]))


def expectation(logits, ref_logits, estimator):
    """E_π of the estimate, every token of the vocabulary weighed by its chance, and the exact KL(π ‖ π_ref)."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    estimates = kl_estimate(logprobs, ref_logprobs, estimator)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref_logits)
    )
    return (logprobs.exp() * estimates).sum(-1), exact


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    mean, exact = expectation(2 * random(20, 6), 2 * random(20, 6, seed=1), estimator)
    assert exact.min() > 0.1
    same(mean, exact)


def test_k2_agrees_for_close_distributions_only():
    """E[k2]/KL − 1 shrinks in proportion to the distance."""
    logits, direction = random(20, 6), random(20, 6, seed=1)
    errors = []
    for distance in (1e-2, 1e-3, 1e-4):
        mean, exact = expectation(logits, logits + distance * direction, "k2")
        errors.append((mean / exact - 1).abs().max().item() / distance)
    assert min(errors) > 0.1
    assert max(errors) < 1.1 * min(errors) < 2
    mean, exact = expectation(logits, logits + 3 * direction, "k2")
    assert (mean / exact - 1).abs().max() > 0.5


def test_k2_and_k3_are_never_negative():
    logprobs, ref_logprobs = random(50, 20), random(50, 20, seed=1)
    assert kl_estimate(logprobs, ref_logprobs, "k1").min() < 0
    assert kl_estimate(logprobs, ref_logprobs, "k2").min() >= 0
    assert kl_estimate(logprobs, ref_logprobs, "k3").min() >= 0
    for estimator in ("k1", "k2", "k3"):
        assert (kl_estimate(logprobs, logprobs, estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_of_kl(estimator):
    inputs = [random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()]
    assert gradcheck(lambda *x: kl_estimate(*x, estimator), inputs)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * 1.00064),  # 1 + 0.1 · 64/10000
        (5.4, 0.2 * 0.99936),
        (7.2, 0.2 * 1.00128),  # 1 + 0.2 · 64/10000, where the clip begins
        (60.0, 0.2 * 1.00128),
        (4.8, 0.2 * 0.99872),
        (0.0, 0.2 * 0.99872),
        (-3.0, 0.2 * 0.99872),
    ],
)
def test_next_kl_coef_by_hand(kl, expected):
    assert next_kl_coef(0.2, kl, target=6.0, horizon=10_000, episodes=64) == pytest.approx(expected, rel=1e-14)


# Scores and rewards.


def test_running_moments_are_those_of_all_numbers():
    """Batches of many sizes and means, one number among them, far from 0: squares alone would cancel."""
    batches = [1e6 + 10 * i + random(size, seed=i) for i, size in enumerate((1, 5, 64, 1, 33))]
    moments = RunningMoments()
    for n, batch in enumerate(batches):
        moments.add(batch)
        seen = torch.cat(batches[: n + 1])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean().item(), rel=1e-14)
        if len(seen) > 1:
            same(moments.normalize(batch), (batch - seen.mean()) / (seen.std() + 1e-8), rtol=1e-8, atol=1e-8)


def test_running_moments_by_hand():
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7."""
    moments = RunningMoments()
    moments.add(torch.tensor([1.0, 2.0]))
    moments.add(torch.tensor([6.0]))
    assert (moments.count, moments.mean, moments.squares) == (3, pytest.approx(3), pytest.approx(14))
    same(moments.normalize(table([3, 10])), table([0, 7 / 7**0.5]), rtol=1e-8, atol=0)
    moments.normalize(torch.tensor([100.0]))
    assert moments.count == 3  # to normalize is not to add


def test_running_moments_keep_the_precision_of_float32_scores():
    scores = (1000 + random(500)).float()
    moments = RunningMoments()
    for batch in scores.split(7):
        moments.add(batch)
    exact = scores.double()
    assert moments.mean == pytest.approx(exact.mean().item(), rel=1e-12)
    assert (moments.squares / 499) ** 0.5 == pytest.approx(exact.std().item(), rel=1e-9)


def test_scores_stay_as_they_are_until_two_are_seen():
    moments, scores = RunningMoments(), torch.tensor([3.0, -1.0])
    assert torch.equal(moments.normalize(scores), scores)
    moments.add(torch.tensor([7.0]))
    assert torch.equal(moments.normalize(scores), scores)
    moments.add(torch.tensor([7.0]))
    assert torch.equal(moments.normalize(torch.tensor([7.0])), torch.zeros(1))  # deviation 0, and no division by it


@pytest.mark.parametrize(
    ("penalty", "clip", "expected"),
    [
        (None, None, [3, -5, 1, -0.5]),
        (0.0, None, [3, -5, 1, -0.5]),
        (1.0, None, [3, -6, 0, -0.5]),
        (None, 2.0, [2, -2, 1, -0.5]),
        (1.0, 2.0, [2, -3, 0, -0.5]),  # the penalty is not clipped away
    ],
)
def test_final_scores_by_hand(penalty, clip, expected):
    scores, ended = table(3, -5, 1, -0.5), torch.tensor([True, False, False, True])
    assert final_scores(scores, ended, penalty, clip).tolist() == expected
    assert scores.tolist() == [3, -5, 1, -0.5]


def test_token_rewards_by_hand():
    kl, mask, scores = table([1, 2, 90, 90], [4, 90, 90, 90], [1, 1, 1, 1]), mask_of((2, 1, 4), 4), table(10, 20, 30)
    expected = table([-0.5, -1 + 10, 0, 0], [-2 + 20, 0, 0, 0], [-0.5, -0.5, -0.5, -0.5 + 30])
    assert torch.equal(token_rewards(scores, kl, mask, 0.5), expected)
    assert torch.equal(token_rewards(scores.float(), kl, mask, 0.5), expected)


def test_the_score_can_stand_one_slot_later():
    """As in TRL, where the row is wide enough."""
    kl, mask, scores = table([1, 2, 90, 90], [4, 90, 90, 90], [1, 1, 1, 1]), mask_of((2, 1, 4), 4), table(10, 20, 30)
    rewards = token_rewards(scores, kl, mask, 0.5, end=torch.tensor([2, 1, 3]))
    assert torch.equal(rewards, table([-0.5, -1, 10, 0], [-2, 20, 0, 0], [-0.5, -0.5, -0.5, -0.5 + 30]))


# Advantages.


def naive_gae(rewards, values, lengths, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, response by response, on plain numbers."""
    advantages = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist()[:length], [*values[row].tolist()[:length], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (n - t) * deltas[n] for n in range(t, length))
    return advantages


def test_gae_by_hand():
    """γ = 1/2, λ = 1/2. δ = 1 + 4/2 − 2 = 1,  3 + 8/2 − 4 = 3,  5 − 8 = −3;  A = 1 + 2.25/4,  3 − 3/4,  −3."""
    rewards, values = table([1, 3, 5], [7, 90, 90]), table([2, 4, 8], [6, 90, 90])
    advantages, returns = gae(rewards, values, mask_of((3, 1), 3), gamma=0.5, lam=0.5)
    same(advantages, table([1.5625, 2.25, -3], [1, 0, 0]))
    same(returns, table([3.5625, 6.25, 5], [7, 0, 0]))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_equals_its_definition(gamma, lam):
    rewards, values = random(4, 7), random(4, 7, seed=1)
    expected = naive_gae(rewards, values, LENGTHS, gamma, lam)
    same(gae(rewards, values, MASK, gamma, lam), (expected, expected + values * MASK))


def test_defaults_of_gae():
    rewards, values = random(4, 7), random(4, 7, seed=1)
    same(gae(rewards, values, MASK)[0], naive_gae(rewards, values, LENGTHS, 1.0, 0.95))


def test_lambda_1_gives_the_sum_of_future_rewards():
    rewards, values = random(4, 7), random(4, 7, seed=1)
    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_go = (rewards * MASK).flip(1).cumsum(1).flip(1)
    same(returns, to_go * MASK)


def test_lambda_0_gives_the_temporal_difference():
    rewards, values = random(4, 7), random(4, 7, seed=1)
    advantages, _ = gae(rewards, values, MASK, gamma=0.9, lam=0.0)
    for row, length in enumerate(LENGTHS):
        v = values[row, :length]
        same(advantages[row, :length], rewards[row, :length] + 0.9 * torch.cat([v[1:], v.new_zeros(1)]) - v)


def test_a_true_value_function_has_no_advantages():
    """V_t = Σ γ^n r_{t+n}: nothing is left to learn, whatever λ."""
    rewards, values = random(1, 6), torch.zeros(1, 6, dtype=torch.float64)
    for t in reversed(range(6)):
        values[0, t] = rewards[0, t] + (0.9 * values[0, t + 1] if t < 5 else 0)
    advantages, returns = gae(rewards, values, torch.ones(1, 6, dtype=torch.bool), gamma=0.9, lam=0.7)
    same(advantages, torch.zeros(1, 6))
    same(returns, values)


def test_padding_and_the_other_responses_change_no_advantage():
    rewards, values = random(4, 7), random(4, 7, seed=1)
    together = gae(rewards, values, MASK, 0.9, 0.8)
    for row, length in enumerate(LENGTHS):
        part = (slice(row, row + 1), slice(0, length))
        alone = gae(rewards[part], values[part], torch.ones(1, length, dtype=torch.bool), 0.9, 0.8)
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours[part], expected)


def test_gradcheck_of_gae():
    inputs = [random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()]
    assert gradcheck(lambda *x: gae(*x, mask_of((3, 1), 3), 0.9, 0.8), inputs)


def trl_steps_4_to_6(logprobs, ref_logprobs, values, scores, sequence_lengths, args):
    """Transcribed from PPOTrainer.train of TRL 1.12. `sequence_lengths` holds the index of the last token."""
    response_idxs = torch.arange(logprobs.shape[1]).repeat(logprobs.shape[0], 1)
    padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
    logprobs = torch.masked_fill(logprobs, padding_mask, trl.INVALID_LOGPROB)
    ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, trl.INVALID_LOGPROB)
    sequence_lengths_p1 = sequence_lengths + 1
    padding_mask_p1 = response_idxs > (sequence_lengths_p1.unsqueeze(1))
    values = torch.masked_fill(values, padding_mask_p1, 0)
    logr = ref_logprobs - logprobs
    kl = -logr if args["kl_estimator"] == "k1" else (logr.exp() - 1) - logr
    rewards = (-args["kl_coef"] * kl).clone()
    actual_start = torch.arange(rewards.size(0))
    actual_end = torch.where(sequence_lengths_p1 < rewards.size(1), sequence_lengths_p1, sequence_lengths)
    rewards[actual_start, actual_end] += scores
    if args["whiten_rewards"]:
        rewards = trl.masked_whiten(rewards, mask=~padding_mask_p1, shift_mean=False)
        rewards = torch.masked_fill(rewards, padding_mask_p1, 0)
    lastgaelam = 0
    advantages_reversed = []
    gen_length = logprobs.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + args["gamma"] * nextvalues - values[:, t]
        lastgaelam = delta + args["gamma"] * args["lam"] * lastgaelam
        advantages_reversed.append(lastgaelam)
    advantages = torch.stack(advantages_reversed[::-1], axis=1)
    returns = advantages + values
    advantages = trl.masked_whiten(advantages, ~padding_mask)
    return torch.masked_fill(advantages, padding_mask, 0), returns


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_from_logprobs_to_advantages_as_in_trl(estimator, whiten_rewards):
    logprobs, ref_logprobs, values = (random(4, 7, seed=seed) for seed in range(3))
    scores, last = random(4, seed=3), torch.tensor(LENGTHS) - 1
    args = {"kl_coef": 0.05, "gamma": 0.99, "lam": 0.95, "kl_estimator": estimator, "whiten_rewards": whiten_rewards}
    expected = trl_steps_4_to_6(logprobs, ref_logprobs, values, scores, last, args)

    end = (last + 1).clamp(max=6)
    value_mask = mask_of((end + 1).tolist(), 7)
    rewards = token_rewards(scores, kl_estimate(logprobs, ref_logprobs, estimator), MASK, 0.05, end)
    if whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False)
    advantages, returns = gae(rewards, values, value_mask, 0.99, 0.95)
    same((whiten(advantages, MASK), returns), expected, rtol=1e-6, atol=1e-7)


# Advantages over a group.


def test_group_advantages_by_hand():
    """Two prompts with three responses each; deviations √2/√2 = 1 and √24/√2."""
    rewards = table([1, 2, 3, 0, 0, 6])[0]
    same(rloo_advantages(rewards, 3), [-1.5, 0, 1.5, -3, -3, 6])
    same(grpo_advantages(rewards, 3, scale=False), [-1, 0, 1, -2, -2, 4])
    over = 12**0.5 + 1e-4
    same(grpo_advantages(rewards, 3), [-1 / 1.0001, 0, 1 / 1.0001, -2 / over, -2 / over, 4 / over])


@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_response_has_no_part_in_its_own_baseline(size):
    rewards = random(12)
    for row, found in enumerate(rloo_advantages(rewards, size).tolist()):
        start = row - row % size
        others = [rewards[i].item() for i in range(start, start + size) if i != row]
        assert found == pytest.approx(rewards[row].item() - sum(others) / len(others), rel=1e-12)
    same(rloo_advantages(rewards, size), grpo_advantages(rewards, size, scale=False) * size / (size - 1))


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
def test_responses_that_earn_the_same_teach_nothing(advantages):
    same(advantages(torch.full((8,), 7.0, dtype=torch.float64), 4), torch.zeros(8))


# Padding.
SCORES = random(4).float()
PADDED = {
    "masked_mean": (1, lambda x: masked_mean(x, MASK)),
    "token_rewards": (1, lambda kl: token_rewards(SCORES, kl, MASK, 0.5)),
    "token_rewards, one later": (1, lambda kl: token_rewards(SCORES, kl, MASK, 0.5, torch.tensor([5, 1, 3, 6]))),
    "whiten": (1, lambda x: whiten(x, MASK)),
    "whiten, mean kept": (1, lambda x: whiten(x, MASK, shift_mean=False)),
    "gae": (2, lambda r, v: gae(r, v, MASK, 0.9, 0.8)),
    "policy_losses": (3, lambda new, old, a: policy_losses(new, old, a, MASK)),
    "sequence_losses": (2, lambda new, old: sequence_losses(new, old, SCORES, MASK, 5.0)[0][:, None]),
    "grpo_losses": (4, lambda new, old, ref, a: grpo_losses(new, old, ref, a, MASK, 0.2, 0.1)),
    "value_losses": (3, lambda new, old, r: value_losses(new, old, r, MASK)),
}


def outputs_and_gradients(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = random(4, 7, seed=9).float()
    total = sum((weights * x).sum() for x in outputs if x.is_floating_point())
    return [x.detach() for x in outputs], torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("count", "function"), PADDED.values(), ids=PADDED.keys())
def test_padding_is_never_read(count, function, poison):
    """Neither values nor gradients change, and the gradients there are exactly 0."""
    clean = [0.5 * random(4, 7, seed=seed).float() for seed in range(count)]
    outputs, gradients = outputs_and_gradients(function, [x.masked_fill(~MASK, poison) for x in clean])
    expected_outputs, expected_gradients = outputs_and_gradients(function, clean)
    for ours, expected in zip(outputs, expected_outputs, strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(ours, expected)
        assert (ours[~MASK] == 0).all()
        assert (ours[MASK] != 0).any()


# Entropy.


def test_entropy_equals_that_of_torch():
    for scale in (0.0, 1.0, 30.0):
        logits = scale * random(5, 4, 9)
        same(entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-9, atol=1e-12)
    assert entropy(torch.zeros(9, dtype=torch.float64)).item() == pytest.approx(log(9), rel=1e-14)
    same(entropy(table(log(1 / 2), log(1 / 4), log(1 / 4)) + 7), 1.5 * LN2)


def test_entropy_of_a_sure_distribution_is_0():
    assert entropy(torch.tensor([1e4, 0.0, -1e4])).item() == 0.0

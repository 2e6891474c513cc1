"""PPO's losses against arithmetic by hand, float64 loops over plain numbers, and the lines of TRL's PPOTrainer."""

from math import exp, log

from kochat_trl.ppo.objective import (
    grpo_losses,
    kl_estimate,
    masked_mean,
    policy_losses,
    sequence_losses,
    token_weights,
    value_losses,
)
from tests.ppo.numbers import LENGTHS, LN2, MASK, mask_of, random, same, table

import pytest
import torch
from torch.autograd import gradcheck
from trl.experimental.ppo import ppo_trainer as trl


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clips", "gradient"),
    [
        (1.5, 1.0, -1.2, True, 0.0),  # likelier and good: enough
        (1.5, -1.0, 1.5, False, 1.5),  # likelier and bad: back, however far
        (0.5, 1.0, -0.5, False, -0.5),
        (0.5, -1.0, 0.8, True, 0.0),
        (1.1, 2.0, -2.2, False, -2.2),
        (0.9, -2.0, 1.8, False, 1.8),
        (1.0, 3.0, -3.0, False, -3.0),
        (1.0, -3.0, 3.0, False, 3.0),
        (1.25, 2.0, -2.4, True, 0.0),
        (0.75, -2.0, 1.6, True, 0.0),
        (5.0, 0.0, 0.0, False, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clips, gradient):
    """ε = 0.2, the default. d/d log π of −ρA is −ρA, and exactly 0 where the clip binds."""
    old = table([-1.0])
    logprobs = (old + log(ratio)).requires_grad_()
    losses, clipped = policy_losses(logprobs, old, table([advantage]), torch.tensor([[True]]))
    (found,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.item() == pytest.approx(loss, rel=1e-14)
    assert clipped.item() is clips
    assert found.item() == (pytest.approx(gradient, rel=1e-14) if gradient else 0.0)


@pytest.mark.parametrize("cliprange", [0.1, 0.2, 0.5])
def test_policy_losses_equal_the_loop(cliprange):
    logprobs, old_logprobs, advantages = (random(20, 7, seed=seed) for seed in range(3))
    losses, clipped = policy_losses(logprobs, old_logprobs, advantages, mask_of(LENGTHS * 5, 7), cliprange)
    seen = set()
    for row, length in enumerate(LENGTHS * 5):
        assert (losses[row, length:] == 0).all()
        assert not clipped[row, length:].any()
        for t in range(length):
            ratio, a = exp(logprobs[row, t].item() - old_logprobs[row, t].item()), advantages[row, t].item()
            bounded = min(max(ratio, 1 - cliprange), 1 + cliprange)
            assert losses[row, t].item() == pytest.approx(-min(ratio * a, bounded * a), rel=1e-12)
            assert clipped[row, t].item() is (bounded * a < ratio * a)
            seen.add((a > 0, clipped[row, t].item()))
    assert len(seen) == 4


# Group methods.


def test_sequence_losses_by_hand():
    """Ratios 1.1 · 1.2 = 1.32, above the clip at 1.2 with advantages of both signs, and 0.9."""
    log_ratio = table([log(1.1), log(1.2), 9], [log(1.1), log(1.2), 9], [log(0.9), 9, 9])
    old, advantages = random(3, 3), table([2, -2, 3])[0]
    logprobs = (old + log_ratio).requires_grad_()
    losses, clipped = sequence_losses(logprobs, old, advantages, mask_of((2, 2, 1), 3))
    same(losses, [-2.4, 2.64, -2.7])
    assert clipped.tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    same(gradient, table([0, 0, 0], [2.64, 2.64, 0], [-2.7, 0, 0]))


def test_a_response_of_one_token_is_that_token():
    logprobs, old, advantages = (random(20, 1, seed=seed) for seed in range(3))
    mask = mask_of([1] * 20, 1)
    of_tokens, of_responses = (
        policy_losses(logprobs, old, advantages, mask),
        sequence_losses(logprobs, old, advantages[:, 0], mask),
    )
    same(of_responses[0][:, None], of_tokens[0])
    assert torch.equal(of_responses[1][:, None], of_tokens[1])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_the_kl_in_the_loss_has_the_gradient_of_the_kl(estimator, apart):
    """Over all tokens, each as often as π_old draws it, with π at π_old and away from it."""
    logits, ref = random(1, 9).requires_grad_(), random(1, 9, seed=1).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    old = (logits.detach() + apart * random(1, 9, seed=2)).log_softmax(-1)
    everywhere = torch.ones(1, 9, dtype=torch.bool)
    losses, _ = grpo_losses(logprobs, old, ref, torch.zeros(1, 9), everywhere, 0.2, 0.3, estimator)
    expected = 0.3 * (logprobs.exp() * (logprobs - ref)).sum()
    same((old.exp() * losses).sum().detach(), expected.item())
    found = torch.autograd.grad((old.exp() * losses).sum(), logits, retain_graph=True)
    same(found, torch.autograd.grad(expected, logits))


def test_grpo_losses_without_kl_are_the_clipped_ones():
    logprobs, old, ref, advantages = (random(4, 7, seed=seed) for seed in range(4))
    same(grpo_losses(logprobs, old, ref, advantages, MASK), policy_losses(logprobs, old, advantages, MASK))
    same(
        grpo_losses(old, old, ref, advantages, MASK, 0.2, 0.3)[0],
        torch.where(MASK, -advantages + 0.3 * kl_estimate(old, ref, "k3"), 0),
    )


def test_token_weights_by_hand():
    mask = mask_of((2, 4), 5)
    for loss_type, expected in {"grpo": [1 / 2, 1 / 4], "dapo": [1 / 3, 1 / 3], "dr_grpo": [1 / 8, 1 / 8]}.items():
        same(token_weights(mask, loss_type, 8), table(expected).T)
    losses = torch.where(MASK, random(4, 7), 0)
    same((token_weights(MASK, "dapo") * losses).sum() / 4, masked_mean(losses, MASK).item())
    means = [losses[row, :length].mean().item() for row, length in enumerate(LENGTHS)]
    same((token_weights(MASK, "grpo") * losses).sum() / 4, sum(means) / 4)


def test_gradcheck_of_the_group_losses():
    log_ratio = table([-LN2, 0, LN2], [-LN2, 0, LN2], [LN2, 0, 0])
    advantages, mask = table([1, 2, 3], [-1, -2, -3], [1, 1, 1]), mask_of((3, 2, 1), 3)
    old, ref = random(3, 3), random(3, 3, seed=1)
    inputs = [x.requires_grad_() for x in (old + log_ratio, old, ref, advantages)]
    for estimator in ("k1", "k2", "k3"):
        assert gradcheck(lambda *x, e=estimator: grpo_losses(*x, mask, 0.2, 0.3, e)[0], inputs)
    assert gradcheck(lambda new, old, a: sequence_losses(new, old, a[:, 0], mask)[0], [inputs[0], inputs[1], inputs[3]])


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clips", "gradient"),
    [
        (1.5, 1.0, 1.0, 0.125, False, 0.5),  # 0.5²/2, and 0.2²/2 at the clip
        (1.5, 1.0, 2.0, 0.32, True, 0.0),  # 0.5²/2, and 0.8²/2 at the clip
        (0.5, 1.0, 1.0, 0.125, False, -0.5),
        (0.5, 1.0, 0.0, 0.32, True, 0.0),
        (2.0, 1.0, 2.0, 0.32, True, 0.0),  # on the target, and still
        (1.1, 1.0, 3.0, 1.805, False, -1.9),
        (0.9, 1.0, -1.0, 1.805, False, 1.9),
        (1.0, 1.0, 1.0, 0.0, False, 0.0),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, clips, gradient):
    """ε = 0.2, the default. The gradient is V − R, and exactly 0 where the clip binds."""
    values = table([value]).requires_grad_()
    losses, clipped = value_losses(values, table([old]), table([target]), torch.tensor([[True]]))
    (found,) = torch.autograd.grad(losses.sum(), values)
    assert losses.item() == pytest.approx(loss, rel=1e-14)
    assert clipped.item() is clips
    assert found.item() == (pytest.approx(gradient, rel=1e-14) if gradient else 0.0)


@pytest.mark.parametrize("cliprange", [0.1, 0.2, 0.5])
def test_value_losses_equal_the_loop(cliprange):
    values, old_values, returns = (random(4, 7, seed=seed) for seed in range(3))
    losses, clipped = value_losses(values, old_values, returns, MASK, cliprange)
    for row, length in enumerate(LENGTHS):
        assert (losses[row, length:] == 0).all()
        assert not clipped[row, length:].any()
        for t in range(length):
            v, old, target = (x[row, t].item() for x in (values, old_values, returns))
            near = min(max(v, old - cliprange), old + cliprange)
            assert losses[row, t].item() == pytest.approx(max((v - target) ** 2, (near - target) ** 2) / 2, rel=1e-12)
            assert clipped[row, t].item() is ((near - target) ** 2 > (v - target) ** 2)


def trl_losses(new_logprobs, mb_logprobs, mb_advantage, vpred, mb_values, mb_return, padding_mask, args):
    """Transcribed from PPOTrainer.train of TRL 1.12, with one padding mask for the tokens and the values."""
    vpred = torch.masked_fill(vpred, padding_mask, 0)
    vpredclipped = torch.clamp(vpred, mb_values - args["cliprange_value"], mb_values + args["cliprange_value"])
    vf_losses1 = torch.square(vpred - mb_return)
    vf_losses2 = torch.square(vpredclipped - mb_return)
    vf_loss_max = torch.max(vf_losses1, vf_losses2)
    vf_loss = 0.5 * trl.masked_mean(vf_loss_max, ~padding_mask)
    vf_clipfrac = trl.masked_mean((vf_losses2 > vf_losses1).double(), ~padding_mask)
    new_logprobs = torch.masked_fill(new_logprobs, padding_mask, trl.INVALID_LOGPROB)
    ratio = torch.exp(new_logprobs - mb_logprobs)
    pg_losses = -mb_advantage * ratio
    pg_losses2 = -mb_advantage * torch.clamp(ratio, 1.0 - args["cliprange"], 1.0 + args["cliprange"])
    pg_loss_max = torch.max(pg_losses, pg_losses2)
    pg_loss = trl.masked_mean(pg_loss_max, ~padding_mask)
    pg_clipfrac = trl.masked_mean((pg_losses2 > pg_losses).double(), ~padding_mask)
    return pg_loss, vf_loss, pg_clipfrac, vf_clipfrac


def test_losses_and_their_gradients_as_in_trl():
    logprobs, old_logprobs, advantages, values, old_values, returns = (0.5 * random(4, 7, seed=n) for n in range(6))
    logprobs.requires_grad_(), values.requires_grad_()
    args = {"cliprange": 0.2, "cliprange_value": 0.3}
    theirs = trl_losses(logprobs, old_logprobs, advantages, values, old_values, returns, ~MASK, args)
    policy, policy_clipped = policy_losses(logprobs, old_logprobs, advantages, MASK, 0.2)
    value, value_clipped = value_losses(values, old_values, returns, MASK, 0.3)
    ours = [masked_mean(x, MASK) for x in (policy, value, policy_clipped.double(), value_clipped.double())]
    same(tuple(ours), theirs)
    assert all(0 < x < 1 for x in ours[2:])
    same(
        torch.autograd.grad(ours[0] + 0.1 * ours[1], [logprobs, values]),
        torch.autograd.grad(theirs[0] + 0.1 * theirs[1], [logprobs, values]),
    )


def test_gradcheck_of_the_policy_loss():
    """ρ of 1/2, 1 and 2, far from the kinks at 1 ± 0.2, with advantages of both signs."""
    log_ratio = table([-LN2, 0, LN2], [-LN2, 0, LN2], [LN2, 0, 0])
    advantages, mask = table([1, 2, 3], [-1, -2, -3], [1, 1, 1]), mask_of((3, 3, 1), 3)
    old = random(3, 3)
    inputs = [(old + log_ratio).requires_grad_(), old.requires_grad_(), advantages.requires_grad_()]
    assert gradcheck(lambda *x: policy_losses(*x, mask)[0], inputs)


def test_gradcheck_of_the_value_loss():
    old = random(3, 3)
    values = old + table([-0.5, 0.1, 0.5], [-0.5, -0.1, 0.5], [0.5, 0, 0])
    returns, mask = old + table([-2, -2, -2], [2, 2, 2], [2, 2, 2]), mask_of((3, 3, 1), 3)
    inputs = [x.requires_grad_() for x in (values, old, returns)]
    assert gradcheck(lambda *x: value_losses(*x, mask)[0], inputs)

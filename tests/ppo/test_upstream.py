"""What KoChatGPT computes in PPO, to the number, beside what we do.

Its formulas stand here, a few lines each, as a reference to compare with: no recipe trains in them. (b, t) are tensors
of b responses of t tokens, and d = log π − log π_ref.
"""

from copy import deepcopy
from math import e, log

from kochat_trl.models.heads import lm_head
from kochat_trl.ppo import objective
from kochat_trl.ppo.roles import Role
from kochat_trl.ppo.rollout import sample_responses
from tests.tiny import gpt2_config

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.generation import TopKLogitsWarper


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def upstream_kl(logprobs, ref_logprobs):
    """One number a response, (b,): the mean of e^d − 1 − d over its tokens."""
    d = logprobs - ref_logprobs
    return (d.exp() - 1 - d).mean(dim=1)


def upstream_reward(scores, kl):
    return scores - 0.1 * kl


def upstream_value(head_outputs):
    """Mean of the head's outputs, (b, sequence), over all positions but the last, prompt and padding included."""
    return head_outputs[:, :-1].mean(dim=1)


def upstream_policy_loss(logprobs, old_logprobs, advantage):
    """One advantage a response, (b,), for each of its tokens."""
    ratio, advantage = (logprobs - old_logprobs).exp(), advantage[:, None]
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def upstream_value_loss(values, old_values, rewards):
    near = old_values + (values - old_values).clamp(-0.4, 0.4)
    return torch.max((near - rewards) ** 2, (values - rewards) ** 2).mean()


# KL


def test_our_k3_is_unbiased_and_upstream_s_sign_is_not():
    """Over all three tokens: ours is KL(π ‖ π_ref) to the last digit, upstream's is Σ π²/π_ref − 1 − KL."""
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.3, 0.5)
    logprobs, ref_logprobs = policy.log()[:, None], reference.log()[:, None]  # a response of each token alone
    kl = 0.5 * log(2.5) + 0.3 * log(1) + 0.2 * log(0.4)  # 0.275
    ours = objective.kl_estimate(logprobs, ref_logprobs, "k3").squeeze(1)
    theirs = upstream_kl(logprobs, ref_logprobs)

    assert ours.tolist() == pytest.approx([0.4 - 1 + log(2.5), 0, 2.5 - 1 - log(2.5)])  # 0.316, 0, 0.584
    assert theirs.tolist() == pytest.approx([2.5 - 1 - log(2.5), 0, 0.4 - 1 + log(2.5)])  # 0.584, 0, 0.316
    assert (policy @ ours).item() == pytest.approx(kl, rel=1e-12)
    assert (policy @ theirs).item() == pytest.approx(0.25 / 0.2 + 0.09 / 0.3 + 0.04 / 0.5 - 1 - kl, rel=1e-12)  # 0.355
    # It would estimate the other KL, on samples of the reference: these are the policy's.
    assert (reference @ theirs).item() == pytest.approx(0.2 * log(0.4) + 0.5 * log(2.5), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 64])
def test_upstream_s_kl_costs_the_same_at_any_length_and_ours_grows(length):
    """d = 1 on each token: 0.1 · (e − 2) a response for upstream, 0.1 · (1/e) a token in our k3."""
    logprobs, scores = torch.full((1, length), -1.0, dtype=torch.float64), tensor(3.0)
    ref_logprobs, mask = logprobs - 1, torch.ones(1, length, dtype=torch.bool)
    theirs = upstream_reward(scores, upstream_kl(logprobs, ref_logprobs))
    ours = objective.token_rewards(scores, objective.kl_estimate(logprobs, ref_logprobs, "k3"), mask, kl_coef=0.1)
    assert theirs.item() == pytest.approx(3 - 0.1 * (e - 2))
    assert ours.sum().item() == pytest.approx(3 - 0.1 * length / e)


# Advantages

PROMPT, RESPONSE, PAD = [0, 1], [2, 3, 4], 5
OUTPUTS = [1.0, 2.0, 4.0, 0.0, 5.0, -3.0]  # the head's output for the ids 0 to 5


def test_upstream_s_value_is_a_matter_of_padding():
    """(1 + 2 + 4 + 0)/4, and with two padding tokens (1 + 2 + 4 + 0 + 5 − 3)/6."""
    outputs = tensor(*OUTPUTS)
    ids = PROMPT + RESPONSE
    assert upstream_value(outputs[torch.tensor([ids])]).item() == 1.75
    assert upstream_value(outputs[torch.tensor([ids + [PAD] * 2])]).item() == 1.5


def test_upstream_s_first_step_learns_nothing_and_ours_does():
    """Critic and reward model are copies of one network, policy and reference too: reward − V is 0, a token's isn't."""
    critic = nn.Embedding.from_pretrained(tensor(*OUTPUTS)[:, None])
    reward_model = deepcopy(critic)
    ids, tokens = torch.tensor([PROMPT + RESPONSE]), torch.tensor([RESPONSE])
    logits = torch.randn(1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    old_logprobs = ref_logprobs = logprobs.detach()
    scores, head_outputs = upstream_value(reward_model(ids).squeeze(-1)), critic(ids).squeeze(-1)

    advantage = upstream_reward(scores, upstream_kl(old_logprobs, ref_logprobs)) - upstream_value(head_outputs)
    their_loss = upstream_policy_loss(logprobs, old_logprobs, advantage)
    (their_gradient,) = torch.autograd.grad(their_loss, logits, retain_graph=True)
    assert advantage.tolist() == [0]
    assert their_loss.item() == 0
    assert not their_gradient.any()

    # The same score, 1.75 at the last token, and the same outputs, 2, 4 and 0 where the three tokens are chosen.
    mask = torch.ones(1, 3, dtype=torch.bool)
    kl = objective.kl_estimate(old_logprobs, ref_logprobs)
    rewards = objective.token_rewards(scores, kl, mask, kl_coef=0.1)
    advantages, _ = objective.gae(rewards, head_outputs[:, 1:-1], mask, gamma=1.0, lam=0.95)
    last = 1.75 - 0
    middle = 0 - 4 + 0.95 * last
    first = 4 - 2 + 0.95 * middle
    assert rewards.tolist() == [[0, 0, 1.75]]
    assert advantages[0].tolist() == pytest.approx([first, middle, last])  # −0.22, −2.34, 1.75

    advantages = objective.whiten(advantages, mask)
    assert (advantages.abs() > 0.01).all()
    losses, _ = objective.policy_losses(logprobs, old_logprobs, advantages, mask)
    (our_gradient,) = torch.autograd.grad(losses.mean(), logits)
    # The policy gradient: −A_t (1[v = token] − p_v) / 3.
    chosen = nn.functional.one_hot(tokens, 6) - logits.detach().softmax(-1)
    torch.testing.assert_close(our_gradient, -advantages[..., None] * chosen / 3)
    assert our_gradient.abs().max() > 0.1


# Losses


@pytest.mark.parametrize("advantage", [2.0, -1.0])
def test_upstream_s_policy_loss_is_ours_with_one_advantage_for_all_tokens(advantage):
    """Ratios 0.5, 1 and 2: the clip binds at 1.2 above for A > 0, and at 0.8 below for A < 0."""
    old_logprobs = tensor(-1.0, -2.0, -3.0)[None]
    logprobs = old_logprobs + tensor(0.5, 1.0, 2.0).log()
    by_hand = -advantage * ((0.5 + 1 + 1.2) if advantage > 0 else (0.8 + 1 + 2)) / 3
    ours, _ = objective.policy_losses(
        logprobs, old_logprobs, torch.full((1, 3), advantage).double(), torch.ones(1, 3, dtype=torch.bool)
    )
    assert upstream_policy_loss(logprobs, old_logprobs, tensor(advantage)).item() == pytest.approx(by_hand)
    assert ours.mean().item() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("value", "upstream"),
    [
        (1.2, 0.8**2),  # near the old value 1: (1.2 − 2)²
        (2.0, 0.6**2),  # right, but clipped to 1.4
        (0.5, 1.5**2),  # worse than clipped to 0.6
        (3.0, 1.0**2),  # beyond, and worse than clipped
    ],
)
def test_upstream_s_value_loss_is_twice_ours(value, upstream):
    """V_old = 1, R = 2, ε = 0.4: max((V_clip − R)², (V − R)²), and ours is half of it, as is its gradient."""
    values, old_values, returns = tensor(value).requires_grad_(), tensor(1.0), tensor(2.0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    theirs = upstream_value_loss(values, old_values, returns)
    ours, _ = objective.value_losses(values[None], old_values[None], returns[None], mask, cliprange_value=0.4)
    assert theirs.item() == pytest.approx(upstream)
    assert ours.item() == pytest.approx(upstream / 2)
    (their_gradient,), (our_gradient,) = (torch.autograd.grad(loss.sum(), values) for loss in (theirs, ours))
    assert our_gradient.item() == pytest.approx(their_gradient.item() / 2)


# Sampling


@pytest.mark.parametrize(
    ("probabilities", "k", "mass"),
    [(tensor(0.4, 0.3, 0.2, 0.1), 2, 0.7), (torch.arange(1, 101).double() / 5050, 50, 3775 / 5050)],
    ids=["top 2 of 4", "top 50 of 100"],
)
def test_upstream_s_ratio_is_off_by_the_mass_of_the_top_k(probabilities, k, mass):
    """It samples from q = p/mass on the top k, and takes log p for log q: too low by −log mass at each token."""
    logits = probabilities.log()[None]
    sampled = TopKLogitsWarper(k)(None, logits).log_softmax(-1)
    kept = sampled.isfinite()
    assert kept.sum() == k
    gap = sampled[kept] - logits.log_softmax(-1)[kept]
    assert gap.tolist() == pytest.approx([-log(mass)] * k)
    # So the mean of p/q under q, which is 1 where q is p, is the mass.
    assert (sampled[kept].exp() * (-gap).exp()).sum().item() == pytest.approx(mass)


def test_our_samples_come_from_the_whole_distribution_that_is_scored():
    """2,000 draws: each token as often as its probability says (5 σ), and one in three beyond the top 2."""
    model = GPT2LMHeadModel(gpt2_config(5, n_positions=4, n_embd=4, n_layer=1, n_head=1)).eval()
    probabilities = tensor(0.4, 0.27, 0.2, 0.1, 0.03)
    model.lm_head = nn.Linear(4, 5)
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = probabilities.log().float()
    draws = sample_responses(Role(model, lm_head(model), None), [[0]] * 2000, range(2000), 1, 1.0, (), 2000)
    counts = torch.tensor(draws).flatten().bincount(minlength=5)
    assert ((counts - 2000 * probabilities).abs() < 5 * (2000 * probabilities * (1 - probabilities)).sqrt()).all()
    assert counts[2:].sum() > 500

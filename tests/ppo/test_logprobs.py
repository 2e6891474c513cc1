"""log-probabilities in small parts against torch.log_softmax over all the scores at once."""

from kochat_trl.models.heads import LMHead
from kochat_trl.ppo import logprobs as module
from kochat_trl.ppo.logprobs import CHUNK

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

HIDDEN, WORDS = 8, 50
SIZES = [1, CHUNK, 2 * CHUNK + 45]


class Doubled(nn.Linear):
    """A head that is more than its weight, as one with an adapter is."""

    def forward(self, x):
        return 2 * super().forward(x)


def token_logprobs(head, *inputs):
    return module.token_logprobs(LMHead(head), *inputs)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_head(trains=False, bias=False, kind=nn.Linear, dtype=torch.float64):
    head = kind(HIDDEN, WORDS, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(head.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + 10))
    return head.requires_grad_(trains)


def make_inputs(n, dtype=torch.float64):
    tokens = torch.randint(WORDS, (n,), generator=torch.Generator().manual_seed(1))
    return random(n, HIDDEN).to(dtype).requires_grad_(), tokens


def reference(head, hidden, tokens, temperature=1.0):
    scores = head(hidden) / temperature
    logprobs = torch.log_softmax(scores, -1)[torch.arange(len(tokens)), tokens]
    return logprobs, Categorical(logits=scores.detach()).entropy()


def with_gradients(function, head, hidden, tokens, temperature=1.0):
    """Both results, and the gradients, of the tokens weighed differently, to `hidden` and to what the head learns."""
    logprobs, entropies = function(head, hidden, tokens, temperature)
    learned = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    weights = random(len(tokens), seed=5).to(logprobs.dtype)
    return logprobs.detach(), entropies, *torch.autograd.grad((weights * logprobs).sum(), learned)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_equals_log_softmax(n, trains, bias, temperature):
    head, (hidden, tokens) = make_head(trains, bias), make_inputs(n)
    ours = with_gradients(token_logprobs, head, hidden, tokens, temperature)
    expected = with_gradients(reference, head, hidden, tokens, temperature)
    assert len(ours) == 3 + trains * (1 + bias)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# Of scores around 100, a cap of 30 leaves next to nothing as it was, and a factor of 1/8 makes another distribution.
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, 30.0), (0.125, None), (16.0, None), (0.5, 30.0)])
@pytest.mark.parametrize("trains", [False, True])
def test_logits_that_are_capped_or_scaled(trains, factor, cap, temperature):
    """As the models write it, in float64; the gradients by autograd, and by finite differences."""
    head, (hidden, tokens) = make_head(trains), make_inputs(40)
    with torch.no_grad():
        head.weight *= 30

    def plain(head, hidden, tokens, temperature):
        logits = head(hidden) * factor
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return reference(lambda _: logits, hidden, tokens, temperature)

    def ours(head, *inputs):
        return module.token_logprobs(LMHead(head, factor, cap), *inputs)

    found = with_gradients(ours, head, hidden, tokens, temperature)
    expected = with_gradients(plain, head, hidden, tokens, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    left_out = with_gradients(token_logprobs, head, hidden, tokens, temperature)
    for ours_, plain_, without in zip(found, expected, left_out, strict=True):
        assert (without - plain_).abs().max() > 1e-2 > (ours_ - plain_).abs().max()
    few = hidden[:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: ours(head, few, tokens[:3], temperature)[0], [few], atol=1e-4)


def test_temperature_is_1_by_default():
    head, (hidden, tokens) = make_head(), make_inputs(3)
    torch.testing.assert_close(token_logprobs(head, hidden, tokens), token_logprobs(head, hidden, tokens, 1.0))


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_that_is_more_than_its_weight(trains):
    head, (hidden, tokens) = make_head(trains, kind=Doubled), make_inputs(5)
    ours = with_gradients(token_logprobs, head, hidden, tokens, 0.7)
    torch.testing.assert_close(ours, with_gradients(reference, head, hidden, tokens, 0.7), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_of_which_a_part_learns(part):
    head, (hidden, tokens) = make_head(bias=True), make_inputs(5)
    getattr(head, part).requires_grad_()
    ours = with_gradients(token_logprobs, head, hidden, tokens, 0.7)
    torch.testing.assert_close(ours, with_gradients(reference, head, hidden, tokens, 0.7), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
@pytest.mark.parametrize("trains", [False, True])
def test_the_size_of_the_parts_changes_nothing(monkeypatch, trains, chunk):
    """But how many tokens the head sees at a time."""
    head, (hidden, tokens) = make_head(trains), make_inputs(32)
    whole = with_gradients(token_logprobs, head, hidden, tokens)
    monkeypatch.setattr(module, "CHUNK", chunk)
    seen = []
    forward = LMHead.forward
    monkeypatch.setattr(LMHead, "forward", lambda self, hidden: seen.append(len(hidden)) or forward(self, hidden))
    parts = with_gradients(token_logprobs, head, hidden, tokens)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    assert max(seen) == min(chunk, 32)
    assert sum(seen) == 32 * (1 + trains)  # computed again in the backward pass


@pytest.mark.parametrize("trains", [False, True])
def test_gradcheck(trains):
    head, (hidden, tokens) = make_head(trains, bias=True), make_inputs(3)
    learned = [hidden, *head.parameters()] if trains else [hidden]
    assert torch.autograd.gradcheck(lambda *_: token_logprobs(head, hidden, tokens, 0.7)[0], learned)


@pytest.mark.parametrize("trains", [False, True])
def test_entropy_has_no_gradient(trains):
    head, (hidden, tokens) = make_head(trains), make_inputs(3)
    logprobs, entropies = token_logprobs(head, hidden, tokens)
    assert logprobs.requires_grad
    assert not entropies.requires_grad


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_extreme_scores(scale, trains):
    """e^score overflows; the token is sure, or its probability is 0 in float32."""
    head, (hidden, tokens) = make_head(trains, dtype=torch.float32), make_inputs(20)
    hidden = (hidden.detach() * scale).float().requires_grad_()
    tokens[:10] = head(hidden[:10]).argmax(1)
    logprobs, entropies, *gradients = with_gradients(token_logprobs, head, hidden, tokens)
    exact = reference(head.double(), hidden.detach().double(), tokens)
    assert (exact[0] > -1e-3).any()
    assert exact[0].min() < -100
    torch.testing.assert_close((logprobs.double(), entropies.double()), exact, rtol=1e-5, atol=1e-5 * scale)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("trains", [False, True])
def test_a_bfloat16_head_gives_float32(trains):
    """Its scores are rounded to bfloat16; their softmax is not."""
    head, (hidden, tokens) = make_head(trains, dtype=torch.bfloat16), make_inputs(20, torch.bfloat16)
    logprobs, entropies, *gradients = with_gradients(token_logprobs, head, hidden, tokens, 0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected = reference(lambda hidden: head(hidden).double(), hidden, tokens, 0.7)
    torch.testing.assert_close((logprobs.double(), entropies.double()), expected, rtol=1e-6, atol=1e-5)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_where_the_policy_is_sure(autocast, trains):
    """They are far shorter than the words' vectors: as a difference of two of those, they would be rounding errors."""
    dtype = torch.float32 if autocast else torch.bfloat16
    head = make_head(trains, dtype=dtype)
    head.weight.data.copy_((random(WORDS, HIDDEN) + 3 * random(HIDDEN, seed=1)).bfloat16())
    hidden = (4 * random(WORDS, HIDDEN, seed=2)).bfloat16().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = head(hidden).double()
        tokens = scores.argmax(1)
        _, _, gradient, *_ = with_gradients(token_logprobs, head, hidden, tokens)
    residual = torch.eye(WORDS)[tokens] - scores.softmax(1)
    expected = random(WORDS, seed=5)[:, None] * (residual @ head.weight.double())
    doubt = residual.abs().amax(1)
    sure = (doubt < 0.05) & (doubt > 1e-3)
    assert sure.sum() >= 5
    errors = (gradient - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors[sure].max() < 0.05


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_without_gradients(wrapped, trains, needs_gradient):
    head, (hidden, tokens) = make_head(trains), make_inputs(CHUNK + 1)
    expected = tuple(x.detach() for x in reference(head, hidden, tokens, 0.7))
    hidden.requires_grad_(needs_gradient)
    with torch.no_grad():
        results = token_logprobs(nn.Sequential(head) if wrapped else head, hidden, tokens, 0.7)
    assert not any(x.requires_grad for x in results)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


def saved_shapes(function, *inputs):
    """The shapes of all tensors that autograd keeps for the backward pass."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = function(*inputs)
        assert logprobs.requires_grad
    return shapes


@pytest.mark.parametrize("trains", [False, True])
def test_no_scores_are_kept(trains):
    """The frozen head keeps a hidden vector for each token; plain log_softmax keeps all scores."""
    n = 2 * CHUNK + 45
    head, (hidden, tokens) = make_head(trains), make_inputs(n)
    assert (n, WORDS) in saved_shapes(reference, head, hidden, tokens)
    shapes = saved_shapes(token_logprobs, head, hidden, tokens)
    assert not [shape for shape in shapes if WORDS in shape[1:]]
    if not trains:
        assert [shape for shape in shapes if HIDDEN in shape] == [(CHUNK, HIDDEN), (CHUNK, HIDDEN), (45, HIDDEN)]

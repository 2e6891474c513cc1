"""The reward losses against TRL's RewardTrainer, the textbook formulas, and a count over all orders in float64."""

from itertools import permutations, product

from kochat_trl.models.loading import new_reward_model
from kochat_trl.reward.losses import all_pairs_loss, group_pairs, listwise_loss, pairwise_loss
from kochat_trl.rows.encode import encode_dialogue
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

LN2 = 0.6931471805599453
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]


def with_gradients(loss_function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = loss_function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def random_scores(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def table(*rows):
    return torch.tensor(rows)


# The references, each as its definition reads.


def naive_pairwise(chosen, rejected, margin=0.0, center=0.0):
    losses = -torch.log(torch.sigmoid(chosen - rejected - margin))
    return (losses + center * (chosen + rejected) ** 2).mean()


def naive_all_pairs(scores, ranks, margin_per_rank=0.0, center=0.0):
    means = []
    for row, rank in zip(scores, ranks.tolist(), strict=True):
        losses = [
            naive_pairwise(row[i], row[j], margin_per_rank * (rank[j] - rank[i]), center)
            for i, j in permutations(range(len(rank)), 2)
            if 0 <= rank[i] < rank[j]
        ]
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def orders_of(rank):
    """All orders of the ranked slots in which no slot stands before a better one."""
    slots = [i for i, value in enumerate(rank) if value >= 0]
    return [order for order in permutations(slots) if [rank[i] for i in order] == sorted(rank[i] for i in slots)]


def plackett_luce(row, rank):
    """P(ranking): the sum over its orders of the product over places of e^score / Σ e^score of those left."""
    weights = row.exp()
    chances = [[weights[i] / weights[list(order[n:])].sum() for n, i in enumerate(order)] for order in orders_of(rank)]
    return sum(torch.stack(places).prod() for places in chances)


def log_plackett_luce(row, rank):
    """The same in logarithms, for scores whose e^score overflows."""
    chances = [sum(row[list(o[n:])].log_softmax(0)[0] for n in range(len(o))) for o in orders_of(rank)]
    return torch.stack(chances).logsumexp(0)


# Pairs.


def test_pairwise_by_hand():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert pairwise_loss(zero, zero).item() == pytest.approx(LN2, abs=1e-15)
    assert pairwise_loss(one, zero).item() == pytest.approx(0.31326168751822286, abs=1e-15)  # ln(1 + 1/e)
    assert pairwise_loss(zero, one).item() == pytest.approx(1.3132616875182228, abs=1e-15)  # ln(1 + e)
    assert pairwise_loss(zero, 25 * one).item() == pytest.approx(25 + 1.388794386486758e-11, abs=4e-15)  # 25 + e⁻²⁵
    assert pairwise_loss(one, zero, margin=one).item() == pytest.approx(LN2, abs=1e-15)
    assert pairwise_loss(3 * one, 3 * one, center_coefficient=0.5).item() == pytest.approx(LN2 + 18, abs=1e-14)
    both = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert both.item() == pytest.approx((0.31326168751822286 + 1.3132616875182228) / 2, abs=1e-6)


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("use_margin", [False, True])
def test_pairwise_equals_the_textbook_formula_in_float64(use_margin, center):
    inputs = list(random_scores(3 if use_margin else 2, 64) * 2)
    value, gradients = with_gradients(lambda *x: pairwise_loss(*x, center_coefficient=center), *inputs)
    expected, expected_gradients = with_gradients(lambda *x: naive_pairwise(*x, center=center), *inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_all_pairs_equals_the_loop_over_pairs(margin, center):
    """With ties, gaps between ranks, unranked slots, and prompts with one pair, many pairs and none."""
    ranks = table([0, 1, 2, 3], [3, 0, 0, 1], [-1, 5, -1, 2], [1, 1, 1, 1], [-1, -1, -1, 0], [0, 0, 2, -1])
    scores = random_scores(6, 4)
    value, gradients = with_gradients(lambda s: all_pairs_loss(s, ranks, margin, center), scores)
    expected, expected_gradients = with_gradients(lambda s: naive_all_pairs(s, ranks, margin, center), scores)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-15)


def test_group_pairs_by_hand():
    row, better, worse = group_pairs(table([2, 0, 1], [0, -1, 0], [-1, 3, 1]))
    assert list(zip(row.tolist(), better.tolist(), worse.tolist(), strict=True)) == [
        (0, 1, 0),
        (0, 1, 2),
        (0, 2, 0),
        (2, 2, 1),
    ]


def test_groups_and_pair_by_pair_are_the_same_loss():
    """All pairs of a group in one loss, or the same pairs one by one: the same value and the same gradient."""
    ranks = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    row, better, worse = group_pairs(ranks)
    assert len(row) == 6 * 6
    together = with_gradients(lambda s: all_pairs_loss(s, ranks), random_scores(6, 4))
    one_by_one = with_gradients(lambda s: pairwise_loss(s[row, better], s[row, worse]), random_scores(6, 4))
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-15)

    # With unequal numbers of pairs they differ: six pairs and one pair, each prompt half of the mean.
    ranks, scores = table([0, 1, 2, 3], [0, 1, -1, -1]), table([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
    row, better, worse = group_pairs(ranks)
    assert all_pairs_loss(scores, ranks).item() == pytest.approx((LN2 + 1.3132617) / 2)
    assert pairwise_loss(scores[row, better], scores[row, worse]).item() == pytest.approx((6 * LN2 + 1.3132617) / 7)


# TRL's RewardTrainer, called for real.

ANSWERS = [
    ("수도는 어디인가요?", ["서울입니다.", "서울 서울 서울 서울", "몰라", "도쿄"]),
    ("반가워요", ["저도 반가워요. 무엇을 도와드릴까요?", "반가", "반가워요", "음"]),
    ("강아지는 어떻게 울어요?", ["강아지는 멍멍 하고 울어요.", "(멍멍)", "I do not know.", "높다"]),
]


@pytest.fixture(scope="module")
def sequences(tiny_tokenizer):
    """Token ids of every answer of every prompt, of different lengths."""

    def ids(prompt, answer):
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        return encode_dialogue(tiny_tokenizer, turns)[0]

    return [[ids(prompt, answer) for answer in answers] for prompt, answers in ANSWERS]


@pytest.fixture
def make_trainer(tmp_path, tiny_base, tiny_tokenizer):
    def make(rows, **config):
        torch.manual_seed(0)
        model = new_reward_model(tiny_base, ModelArguments(), tiny_tokenizer).double()
        with torch.no_grad():
            model.score.weight.mul_(20)  # so that scores differ by several nats
        args = RewardConfig(
            tmp_path, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **config
        )
        return RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer)

    return make


def score(model, ids):
    """The head's output at the last token of a sequence that stands alone, without padding."""
    hidden = model.transformer(input_ids=torch.tensor([ids])).last_hidden_state
    return model.score(hidden)[0, -1, 0]


def assert_same_loss(model, theirs, ours):
    """Equal values, and equal gradients of every weight: the head, the blocks, the embeddings."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    names, weights = zip(*model.named_parameters(), strict=True)
    expected, gradients = (torch.autograd.grad(loss, weights) for loss in (theirs, ours))
    for name, gradient, target in zip(names, gradients, expected, strict=True):
        if name in ("score.weight", "transformer.h.0.attn.c_attn.weight"):
            assert target.abs().max() > 0.01, name
        torch.testing.assert_close(gradient, target, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("use_margin", [False, True])
def test_pairwise_equals_trl_s_reward_trainer(make_trainer, sequences, use_margin, center):
    rows = [{"chosen_ids": answers[0], "rejected_ids": answers[1]} for answers in sequences]
    if use_margin:
        rows = [row | {"margin": margin} for row, margin in zip(rows, (0.0, 0.5, 2.0), strict=True)]
    trainer = make_trainer(rows, center_rewards_coefficient=center)
    model = trainer.model.train()
    batch = trainer.data_collator(rows)
    assert ("margin" in batch) == use_margin
    assert not batch["attention_mask"].all()  # there is padding
    theirs = trainer.compute_loss(model, dict(batch))

    chosen, rejected = (torch.stack([score(model, row[key]) for row in rows]) for key in ("chosen_ids", "rejected_ids"))
    assert (chosen - rejected).abs().max() > 1
    ours = pairwise_loss(chosen, rejected, batch.get("margin"), center or 0.0)
    assert_same_loss(model, theirs, ours)


def test_all_pairs_equals_trl_s_reward_trainer(make_trainer, sequences):
    """Three prompts with six pairs each: our loss of the groups is TRL's loss of the eighteen pairs."""
    ranks = table([0, 1, 2, 3], [2, 0, 3, 1], [3, 1, 0, 2])
    rows = [
        {
            "chosen_ids": sequences[row][better],
            "rejected_ids": sequences[row][worse],
            "margin": 0.25 * (ranks[row, worse] - ranks[row, better]).item(),
        }
        for row, better, worse in zip(*group_pairs(ranks), strict=True)
    ]
    trainer = make_trainer(rows, center_rewards_coefficient=0.1)
    theirs = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    scores = torch.stack([torch.stack([score(trainer.model, ids) for ids in answers]) for answers in sequences])
    ours = all_pairs_loss(scores, ranks, margin_per_rank=0.25, center_coefficient=0.1)
    assert_same_loss(trainer.model, theirs, ours)


def test_gradient_accumulation_takes_the_mean_over_micro_batches(make_trainer, sequences):
    """One optimizer step of `train()` on three pairs, as micro-batches of two pairs and of one."""
    rows = [{"chosen_ids": answers[0], "rejected_ids": answers[1], "margin": 0.5} for answers in sequences]
    trainer = make_trainer(
        rows,
        center_rewards_coefficient=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        weight_decay=0.0,
        save_strategy="no",
    )
    batches, gradients = [], {}
    collate = trainer.data_collator

    def record(rows):
        batches.append(rows)
        return collate(rows)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    trainer.data_collator = record
    trainer.add_callback(Watch())
    logged = trainer.train().training_loss
    assert [len(batch) for batch in batches] == [2, 1]

    model, losses = trainer.model, []
    for batch in batches:
        chosen = torch.stack([score(model, row["chosen_ids"]) for row in batch])
        rejected = torch.stack([score(model, row["rejected_ids"]) for row in batch])
        losses.append(pairwise_loss(chosen, rejected, torch.full_like(chosen, 0.5), 0.1))
    assert (losses[0] - losses[1]).abs() > 0.1  # so the mean over pairs would be another number
    ours = (losses[0] + losses[1]) / 2
    expected = torch.autograd.grad(ours, list(model.parameters()))
    assert logged == pytest.approx(ours.item(), rel=1e-6)
    torch.testing.assert_close(list(gradients.values()), list(expected), rtol=1e-9, atol=1e-11)


# Plackett–Luce.


def test_listwise_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64).log()
    for rank, probability in {
        (0, 1, 2): 3 / 6 * 2 / 3,
        (2, 1, 0): 1 / 6 * 2 / 5,
        (0, 0, 1): 3 / 6 * 2 / 3 + 2 / 6 * 3 / 4,
        (0, 1, 1): 3 / 6,
        (4, 2, 2): 2 / 6 * 1 / 4 + 1 / 6 * 2 / 5,
        (-1, 0, 1): 2 / 3,
    }.items():
        assert listwise_loss(scores, table(rank)).exp().item() == pytest.approx(1 / probability, rel=1e-14), rank


def all_ranks(k):
    """Every way to rank k slots: each order, each tie, each choice of slots left unranked."""
    dense = {}
    for ranks in product(range(-1, k), repeat=k):
        tiers = sorted({rank for rank in ranks if rank >= 0})
        dense[tuple(tiers.index(rank) if rank >= 0 else -1 for rank in ranks)] = None
    return list(dense)


@pytest.mark.parametrize(("k", "count"), [(2, 6), (3, 26), (4, 150), (5, 120)])
def test_listwise_equals_the_count_over_all_orders(k, count):
    """For 5 slots, the strict orders only."""
    patterns = all_ranks(k) if k < 5 else list(permutations(range(k)))
    assert len(patterns) == count
    row = random_scores(k)
    for rank in patterns:
        if max(rank) < 1:  # nothing to tell apart
            assert listwise_loss(row.unsqueeze(0), table(rank)).item() == 0
            continue
        value, gradient = with_gradients(lambda s, rank=rank: listwise_loss(s.unsqueeze(0), table(rank)), row)
        expected = with_gradients(lambda s, rank=rank: -plackett_luce(s, rank).log(), row)
        torch.testing.assert_close(
            (value, gradient), expected, rtol=1e-10, atol=1e-14, msg=lambda m, r=rank: f"{r}: {m}"
        )
    strict_orders = table(*permutations(range(k)))
    losses = [listwise_loss(row.unsqueeze(0), rank.unsqueeze(0)).item() for rank in strict_orders]
    assert torch.tensor(losses, dtype=torch.float64).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_listwise_with_larger_ties():
    """Five tied among seven: 240 orders in the count, 32 subsets in the loss."""
    row, rank = random_scores(7), (1, 0, 1, 2, 1, 1, 1)
    value = listwise_loss(row.unsqueeze(0), table(rank))
    torch.testing.assert_close(value, -plackett_luce(row, rank).log(), rtol=1e-12, atol=0)


def test_listwise_is_the_mean_over_prompts_that_compare_something():
    ranks = table([0, 1, 2], [0, 0, 0], [1, 0, 0], [-1, -1, 2], [-1, -1, -1])
    scores = random_scores(5, 3)
    each = [listwise_loss(scores[i : i + 1], ranks[i : i + 1]) for i in (0, 2)]
    torch.testing.assert_close(listwise_loss(scores, ranks), (each[0] + each[1]) / 2)
    torch.testing.assert_close(all_pairs_loss(scores, ranks), naive_all_pairs(scores, ranks))


def test_two_completions_make_the_three_losses_one():
    scores, ranks = random_scores(8, 2), table(*[[0, 1], [1, 0], [0, 3], [7, 2]] * 2)
    row, better, worse = group_pairs(ranks)
    pairwise = with_gradients(lambda s: pairwise_loss(s[row, better], s[row, worse]), scores)
    for loss in (listwise_loss, all_pairs_loss):
        result = with_gradients(lambda s, loss=loss: loss(s, ranks), scores)
        torch.testing.assert_close(result, pairwise, rtol=1e-13, atol=1e-16)


def test_best_against_the_rest_is_cross_entropy():
    scores = random_scores(5, 4)
    ranks = table([0, 1, 1, 1]).expand(5, 4)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(listwise_loss(scores, ranks), expected, rtol=1e-13, atol=0)


# All three: gradients by finite differences, range, padding, refusals.

MIXED_RANKS = table([0, 1, 2, 3], [1, 0, 0, 2], [-1, 1, 0, -1], [0, 0, 1, 1], [2, 2, 2, 2])
GROUP_LOSSES = {
    "listwise": listwise_loss,
    "all_pairs": all_pairs_loss,
    "all_pairs, margin and centring": lambda scores, ranks: all_pairs_loss(scores, ranks, 0.5, 0.1),
}


@pytest.fixture(params=GROUP_LOSSES.values(), ids=GROUP_LOSSES.keys())
def group_loss(request):
    return request.param


def test_gradcheck_of_groups(group_loss):
    scores = random_scores(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: group_loss(s, MIXED_RANKS), [scores])


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("use_margin", [False, True])
def test_gradcheck_of_pairs(use_margin, center):
    inputs = [x.requires_grad_() for x in random_scores(3 if use_margin else 2, 6).unbind()]
    assert torch.autograd.gradcheck(lambda *x: pairwise_loss(*x, center_coefficient=center), inputs)


def test_the_naive_form_overflows_where_this_one_does_not():
    for difference, is_finite in ((-88.0, True), (-89.0, False), (-104.0, False)):
        chosen, rejected = torch.tensor([difference]), torch.zeros(1)
        naive, naive_gradients = with_gradients(naive_pairwise, chosen, rejected)
        assert naive.isfinite().item() is naive_gradients[0].isfinite().item() is is_finite
        value, gradients = with_gradients(pairwise_loss, chosen, rejected)
        assert (value.item(), gradients[0].item(), gradients[1].item()) == (-difference, -1.0, 1.0)


def softplus(x):
    """log(1 + e^x), for any x; `torch.nn.functional.softplus` gives x itself above 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def assert_right_in_low_precision(dtype, low, exact):
    """Value to float32's precision, gradients to that of `dtype`, which they are rounded to."""
    (value, gradients), (expected, expected_gradients) = low, exact
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=5e-7)
    for gradient, target in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), target, rtol=epsilon, atol=5e-7)


DIFFERENCES = [sign * size for size in (1.0, 10.0, 100.0, 1e3, 1e4) for sign in (1, -1)] + [0.0]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_pairs_are_right_in_every_dtype(dtype, difference, center):
    """Against float64 on the same inputs. In float16, (10⁴)² overflows and 10⁴ − 1 is 10⁴."""
    chosen, rejected, margin = (torch.tensor([x], dtype=dtype) for x in (difference, 0.0, 1.0))

    def exact(chosen, rejected):
        return (softplus(1 - chosen + rejected) + center * (chosen + rejected) ** 2).mean()

    low = with_gradients(lambda c, r: pairwise_loss(c, r, margin, center), chosen, rejected)
    assert_right_in_low_precision(dtype, low, with_gradients(exact, chosen.double(), rejected.double()))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_all_pairs_is_right_in_every_dtype(dtype, difference, center):
    scores, ranks = torch.tensor([[difference, 0.0, 0.5 * difference]], dtype=dtype), table([0, 1, 1])

    def exact(scores):
        best, others = scores[:, 0], scores[:, 1:]
        return (softplus(0.5 - best + others) + center * (best + others) ** 2).mean()

    low = with_gradients(lambda s: all_pairs_loss(s, ranks, 0.5, center), scores)
    assert_right_in_low_precision(dtype, low, with_gradients(exact, scores.double()))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("rank", [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1, 0, 0), (0, -1, 1)], ids=str)
def test_listwise_is_right_in_every_dtype(dtype, difference, rank):
    row = torch.tensor([difference, 0.0, 0.5 * difference], dtype=dtype)
    low = with_gradients(lambda s: listwise_loss(s.unsqueeze(0), table(rank)), row)
    exact = with_gradients(lambda s: -log_plackett_luce(s, rank), row.double())
    assert_right_in_low_precision(dtype, low, exact)


def test_a_constant_added_to_all_scores_changes_nothing():
    """Differences are taken first: at 2¹³, float32 has steps of 0.001."""
    scores = table([3.0, -1.0, 0.5, 0.0], [0.25, 0.5, -0.75, 2.0])
    ranks = table([0, 1, 1, 2], [1, 0, 2, -1])
    for loss in (listwise_loss, all_pairs_loss):
        torch.testing.assert_close(loss(scores + 2**13, ranks), loss(scores, ranks), rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_unranked_slots_are_never_read(group_loss, poison):
    """Not their values, and the gradients there are exactly 0; also in a prompt with nothing ranked."""
    ranks = table([-1, 1, 0, 2], [0, -1, 1, -1], [-1, -1, -1, -1], [1, 1, -1, 0])
    clean = random_scores(4, 4).float()
    poisoned = clean.masked_fill(ranks < 0, poison)
    value, (gradient,) = with_gradients(lambda s: group_loss(s, ranks), poisoned)
    expected, (expected_gradient,) = with_gradients(lambda s: group_loss(s, ranks), clean)
    assert value == expected
    assert torch.equal(gradient, expected_gradient)
    assert (gradient[ranks < 0] == 0).all()
    assert (gradient[ranks >= 0] != 0).all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_nothing_to_compare_is_a_loss_of_zero(group_loss, dtype):
    """With a gradient of zero, so that a training step on such a batch goes through."""
    scores, ranks = torch.full((2, 3), float("nan"), dtype=dtype), table([1, 1, 1], [-1, 0, -1])
    value, (gradient,) = with_gradients(lambda s: group_loss(s, ranks), scores)
    assert (value.item(), value.dtype) == (0.0, torch.float32)
    assert torch.equal(gradient, torch.zeros_like(scores))
    empty = torch.zeros(0, dtype=dtype)
    assert with_gradients(pairwise_loss, empty, empty)[0].item() == 0


def test_wrong_shapes_are_refused(group_loss):
    """Where torch would broadcast in silence."""
    with pytest.raises(ValueError, match="same shape"):
        pairwise_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="same shape"):
        pairwise_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(1))
    for ranks in (table([0, 1]), table([0, 1, 2, 3]).expand(2, 4), table([0.0, 1.0, 2.0]).expand(2, 3)):
        with pytest.raises(ValueError, match=r"must both be \(prompts, k\)"):
            group_loss(torch.zeros(2, 3), ranks)
    with pytest.raises(ValueError, match=r"must both be \(prompts, k\)"):
        group_loss(torch.zeros(3), torch.tensor([0, 1, 2]))

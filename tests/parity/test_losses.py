"""The pairwise loss against TRL's RewardTrainer, float64 and the textbook formula."""

import copy

from kochat_trl.losses import pairwise_loss

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification
from trl import RewardConfig, RewardTrainer


def naive(chosen, rejected, margin=0.0):
    return -torch.log(torch.sigmoid(chosen - rejected - margin)).mean()


def with_gradients(loss_function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = loss_function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def test_values_by_hand():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert pairwise_loss(zero, zero).item() == pytest.approx(0.6931471805599453, abs=1e-15)  # ln 2
    assert pairwise_loss(one, zero).item() == pytest.approx(0.31326168751822286, abs=1e-15)  # ln(1 + 1/e)
    assert pairwise_loss(zero, one).item() == pytest.approx(1.3132616875182228, abs=1e-15)  # ln(1 + e)
    assert pairwise_loss(one, zero, margin=one).item() == pytest.approx(0.6931471805599453, abs=1e-15)
    both = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert both.item() == pytest.approx((0.31326168751822286 + 1.3132616875182228) / 2, abs=1e-6)


@pytest.mark.parametrize("use_margin", [False, True])
def test_equals_the_textbook_formula_in_float64(use_margin):
    torch.manual_seed(0)
    inputs = [torch.randn(64, dtype=torch.float64) * 5 for _ in range(3 if use_margin else 2)]
    value, gradients = with_gradients(pairwise_loss, *inputs)
    expected, expected_gradients = with_gradients(naive, *inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-15)
    assert torch.autograd.gradcheck(pairwise_loss, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("difference", [-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
def test_stable_in_every_dtype(dtype, difference):
    """Value and gradient equal the float64 ones to the dtype's precision, up to a difference of 1e4."""
    chosen, rejected = torch.tensor([difference], dtype=dtype), torch.zeros(1, dtype=dtype)
    value, gradients = with_gradients(pairwise_loss, chosen, rejected)
    exact = torch.nn.functional.softplus(-chosen.double())
    slope = -torch.sigmoid(-chosen.double())
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), exact.mean(), rtol=resolution, atol=resolution)
    torch.testing.assert_close(gradients[0].double(), slope, rtol=resolution, atol=resolution)
    torch.testing.assert_close(gradients[1], -gradients[0])


def test_the_naive_form_overflows_where_this_one_does_not():
    chosen, rejected = torch.tensor([-89.0]), torch.zeros(1)
    assert naive(chosen, rejected).isinf()
    assert pairwise_loss(chosen, rejected).item() == 89.0


@pytest.mark.parametrize("use_margin", [False, True])
def test_equals_trl_s_reward_trainer(tmp_path, use_margin):
    """RewardTrainer.compute_loss, called for real on a batch: the same loss, the same gradient of every weight."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, pad_token_id=3)
    model = GPT2ForSequenceClassification(config).double()
    with torch.no_grad():
        model.score.weight.mul_(50)  # so that scores differ by several nats
    rows = [
        {"chosen_ids": [7, 8, 9, 1], "rejected_ids": [7, 10, 1]},
        {"chosen_ids": [11, 1], "rejected_ids": [11, 12, 13, 14, 15, 1]},
        {"chosen_ids": [20, 21, 22, 1], "rejected_ids": [20, 23, 1]},
    ]
    if use_margin:
        rows = [row | {"margin": margin} for row, margin in zip(rows, (0.0, 0.5, 2.0), strict=True)]
    args = RewardConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=_word_tokenizer())
    batch = trainer.data_collator(rows)
    assert ("margin" in batch) == use_margin

    theirs = trainer.compute_loss(model.train(), copy.copy(batch))
    expected = torch.autograd.grad(theirs, list(model.parameters()))
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = scores.chunk(2)
    ours = pairwise_loss(chosen, rejected, batch.get("margin"))
    gradients = torch.autograd.grad(ours, list(model.parameters()))

    assert (chosen - rejected).abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-14)


def _word_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(50)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="t3", eos_token="t1"
    )

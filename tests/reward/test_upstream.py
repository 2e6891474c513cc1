"""What KoChatGPT computes in its first two stages, to the number, beside what we do.

Its formulas stand here, a few lines each, as a reference to compare with: no recipe trains in them.
"""

from kochat_trl.models.loading import new_reward_model
from kochat_trl.reward.losses import pairwise_loss
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import gpt2_config

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

# Stage 1, SFT.


def upstream_sft_batch(rows, end):
    """Rows of (prompt ids, completion ids with the end) → ids, mask, labels. Its pad token is the end token."""

    def pad(rows, filler):
        return torch.tensor([row + [filler] * (max(map(len, rows)) - len(row)) for row in rows])

    input_ids = pad([prompt + completion for prompt, completion in rows], end)
    labels = pad([[-100] * len(prompt) + completion for prompt, completion in rows], -100)
    return {"input_ids": input_ids, "attention_mask": input_ids.ne(end).long(), "labels": labels}


def our_sft_batch(tokenizer, dialogues):
    """What the SFT recipe trains on: our ids and labels, through TRL's collator."""
    encoded = [encode_dialogue(tokenizer, messages) for messages in dialogues]
    rows = [{"input_ids": input_ids, "labels": labels} for input_ids, labels in encoded]
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)


def dialogue(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


SHORT, LONG = ("반가워요", "반가"), ("강아지는 어떻게 울어요?", "강아지는 멍멍 하고 울어요.")


def test_sft_labels_are_upstream_s_and_the_mask_is_not(tiny_tokenizer):
    end, padding = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    ours = our_sft_batch(tiny_tokenizer, [dialogue(*SHORT), dialogue(*LONG)])
    lengths = ours["attention_mask"].sum(1)
    starts = (ours["labels"] != -100).int().argmax(1)
    rows = [
        (ids[:start].tolist(), ids[start:length].tolist())
        for ids, start, length in zip(ours["input_ids"], starts, lengths, strict=True)
    ]
    # The split is by our labels: hold it against the prompts themselves.
    assert [prompt for prompt, _ in rows] == [
        encode_prompt(tiny_tokenizer, dialogue(turn[0])) for turn in (SHORT, LONG)
    ]
    assert padding != end
    theirs = upstream_sft_batch(rows, end)
    assert lengths[0] < lengths[1] == ours["input_ids"].shape[1]

    # The loss is on the completion and its end token: the prompt and the padding are −100, in both.
    assert torch.equal(ours["labels"], theirs["labels"])
    for (prompt, completion), labels in zip(rows, ours["labels"].tolist(), strict=True):
        rest = len(labels) - len(prompt) - len(completion)
        assert labels == [-100] * len(prompt) + completion + [-100] * rest
        assert completion[-1] == end
        assert len(completion) > 1

    # We pad with another token, and the mask hides the padding alone. Upstream's hides the real end token too.
    for i, length in enumerate(lengths.tolist()):
        filled = ours["input_ids"].shape[1] - length
        assert ours["input_ids"][i].tolist() == rows[i][0] + rows[i][1] + [padding] * filled
        assert theirs["input_ids"][i].tolist() == rows[i][0] + rows[i][1] + [end] * filled
        assert ours["attention_mask"][i].tolist() == [1] * length + [0] * filled
        assert theirs["attention_mask"][i].tolist() == [1] * (length - 1) + [0] * (filled + 1)


@pytest.mark.parametrize(("turns", "is_same"), [(LONG, True), (LONG + SHORT, False)], ids=["one turn", "two turns"])
def test_hiding_the_end_token_costs_nothing_until_a_second_turn(tiny_base, tiny_tokenizer, turns, is_same):
    """Nothing after the last end token reads it; after the first of two turns, everything does."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    batch = our_sft_batch(tiny_tokenizer, [dialogue(*turns)])
    labels = batch["labels"][0, 1:]

    @torch.no_grad()
    def loss(mask):
        """The mean of −log p over the labelled tokens, each predicted one position before it."""
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits[0, :-1]
        return -logits.log_softmax(-1)[labels != -100, labels[labels != -100]].mean().item()

    ours = loss(batch["attention_mask"])
    assert model(**batch).loss.item() == pytest.approx(ours, rel=1e-6)  # transformers computes it in float32
    upstream_mask = batch["input_ids"].ne(tiny_tokenizer.eos_token_id).long()
    assert upstream_mask.sum() == batch["attention_mask"].sum() - len(turns) / 2
    difference = abs(loss(upstream_mask) - ours)
    assert difference < 1e-12 if is_same else difference > 1e-4


# Stage 2, the reward model.


def upstream_score(head_outputs):
    """Mean of the head's outputs, (batch, sequence), over all positions but the last, padding included."""
    return head_outputs[:, :-1].mean(dim=1)


PAD, OUTPUTS = 3, [6.0, 1.0, 2.0, -1.0, 3.0]  # the head's output for the ids 0 to 4; for padding it is −1


class OutputPerToken(nn.Module):
    """A backbone whose hidden state, one number wide, is a known number for each token."""

    def forward(self, input_ids, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=torch.tensor(OUTPUTS)[input_ids].unsqueeze(-1))


@pytest.mark.parametrize(
    ("padding", "upstream"),
    [
        (0, (1 + 2 + 3) / 3),  # 2, without the last token, the end
        (1, (1 + 2 + 3 + 6) / 4),  # 3
        (2, (1 + 2 + 3 + 6 - 1) / 5),  # 2.2
        (5, (1 + 2 + 3 + 6 - 4) / 8),  # 1
        (508, (1 + 2 + 3 + 6 - 507) / 511),  # −0.97: padded to 512, as upstream pads every row
    ],
)
def test_upstream_s_score_is_a_matter_of_padding_and_ours_is_the_last_token_s(padding, upstream):
    """Outputs 1, 2, 3 on a completion and 6 on its end token: our score is 6."""
    config = gpt2_config(5, n_embd=1, n_head=1, n_layer=1, num_labels=1, pad_token_id=PAD)
    model = GPT2ForSequenceClassification(config)
    model.transformer = OutputPerToken()
    nn.init.ones_(model.score.weight)
    input_ids = torch.tensor([[1, 2, 4, 0] + [PAD] * padding])

    head_outputs = model.score(model.transformer(input_ids).last_hidden_state).squeeze(-1)
    assert upstream_score(head_outputs).item() == pytest.approx(upstream, rel=1e-6)
    ours = model(input_ids=input_ids, attention_mask=(input_ids != PAD).long()).logits
    assert ours.tolist() == [[6.0]]


def test_scores_of_a_real_backbone_under_more_and_more_padding(tiny_base, tiny_tokenizer):
    """Upstream's moves with the padding, also where the mask hides it; ours stays."""
    torch.manual_seed(0)
    model = new_reward_model(tiny_base, ModelArguments(), tiny_tokenizer).double().eval()
    ids = encode_dialogue(tiny_tokenizer, dialogue(*LONG))[0]
    ours, theirs = [], []
    for padding in (0, 1, 4, 64):
        input_ids = torch.tensor([ids + [tiny_tokenizer.pad_token_id] * padding])
        inputs = {"input_ids": input_ids, "attention_mask": (torch.arange(len(ids) + padding) < len(ids)).long()[None]}
        with torch.no_grad():
            head_outputs = model.score(model.transformer(**inputs).last_hidden_state).squeeze(-1)
            ours.append(model(**inputs).logits.squeeze(-1))
        theirs.append(upstream_score(head_outputs))
        torch.testing.assert_close(ours[-1], head_outputs[:, len(ids) - 1], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, [ours[0]] * 4, rtol=1e-10, atol=1e-12)
    assert torch.cat(theirs).unique().numel() == 4
    assert (theirs[-1] - theirs[0]).abs() > 0.01


def upstream_pair_loss(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected)).mean()


@pytest.mark.parametrize(("dtype", "first_infinite"), [(torch.float32, -89), (torch.float64, -710)])
def test_upstream_s_pair_loss_is_infinite_from_here_down(dtype, first_infinite):
    """e^89 is beyond float32, so sigmoid(−89) is 0, its logarithm −inf, and the gradient 0 · inf."""
    for difference in range(-1, first_infinite - 100, -1):
        chosen, rejected = torch.tensor([difference], dtype=dtype).requires_grad_(), torch.zeros(1, dtype=dtype)
        theirs, ours = upstream_pair_loss(chosen, rejected), pairwise_loss(chosen, rejected)
        (their_gradient,), (our_gradient,) = (torch.autograd.grad(loss, [chosen]) for loss in (theirs, ours))
        if difference > first_infinite:
            torch.testing.assert_close((ours, our_gradient), (theirs, their_gradient))
        else:
            assert theirs.item() == float("inf")
            assert their_gradient.isnan().all()
        assert ours.item() == pytest.approx(-difference, abs=0.32)
        assert our_gradient.item() == pytest.approx(-1, abs=0.27)
    assert (ours.item(), our_gradient.item()) == (-difference, -1)

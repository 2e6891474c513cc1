"""The head over the vocabulary and the head of scores, on every architecture of benchmarks/architectures.py."""

from benchmarks.architectures import ARCHITECTURES, EMBEDDING, make_config
from kochat_trl.models.heads import LMHead, end_states, lm_head, reward_class, score_head
from kochat_trl.models.loading import positions_of
from kochat_trl.ppo.roles import Role

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

ROWS = [[5, 9, 30, 7, 40, 256], [11, 4, 256], [3, 8, 70, 256]]
LARGE = 40.0  # of a score: beyond every cap


def padded(pad, left=False):
    """ROWS as a batch, and its mask."""
    width = max(map(len, ROWS))
    gaps = [[pad] * (width - len(row)) for row in ROWS]
    ids = [gap + row if left else row + gap for row, gap in zip(ROWS, gaps, strict=True)]
    mask = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for r, g in zip(ROWS, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_the_model_s_own(name):
    """To 1e-5, where scores are so large that a cap or a scale that is left out shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name)).eval()
    ids, mask = padded(0)
    head = lm_head(model)
    role = Role(model, head, None)
    hidden = role.hidden(ids, mask)
    head.linear.weight *= LARGE / head.linear(hidden).abs().max()
    expected = model(input_ids=ids, attention_mask=mask).logits
    ours = head(role.hidden(ids, mask))  # tied weights have changed the hidden states too
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    changed = {"gemma2", "gemma4_text", "hyperclovax", "granite", "cohere", "cohere2"}
    assert (head.factor != 1 or head.cap is not None) == (name in changed)
    left_out = head.linear(role.hidden(ids, mask))
    assert ((left_out - expected)[mask.bool()].abs().max() > 1) == (name in changed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_score_is_read_at_the_end_by_mask(name):
    """Value and gradients as each row alone has them, whatever stands under the mask, the end token too."""
    torch.manual_seed(0)
    config = make_config(name)
    model = reward_class(type(AutoModelForCausalLM.from_config(config)))._from_config(config).eval()
    head = score_head(model)
    torch.nn.init.normal_(head.weight)
    assert model.get_output_embeddings() is None
    assert not [weight for weight in model.state_dict() if "lm_head" in weight or "embed_out" in weight]
    backbone = getattr(model, model.base_model_prefix)
    learned = [model.get_input_embeddings().weight, head.weight]

    def with_gradients(scores):
        return scores.detach(), *torch.autograd.grad(scores.flatten() @ torch.tensor([1.0, -2.0, 0.5]), learned)

    alone = []
    for row in ROWS:
        states = backbone(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))
        alone.append(head(states.last_hidden_state[:, -1]))
    expected = with_gradients(torch.cat(alone))
    for pad in (256, 17, EMBEDDING - 1):
        ids, mask = padded(pad)
        found = with_gradients(model(input_ids=ids, attention_mask=mask).logits)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        single = model(input_ids=torch.tensor(ROWS[:1])).logits  # all of it is text
    torch.testing.assert_close(single, expected[0][:1], rtol=1e-4, atol=1e-5)


def test_the_last_token_is_found_on_either_side():
    hidden = torch.arange(18.0).view(3, 6, 1)
    assert end_states(hidden, padded(0)[1]).flatten().tolist() == [5, 8, 15]
    assert end_states(hidden, padded(0, left=True)[1]).flatten().tolist() == [5, 11, 17]


@torch.no_grad()
def test_the_weights_are_those_of_transformers_classifier(tmp_path):
    """On kogpt2's architecture, by name and value, so that files of either load as the other."""
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=3)
    torch.manual_seed(0)
    ours = reward_class(type(AutoModelForCausalLM.from_config(config)))._from_config(config).eval()
    ours.save_pretrained(tmp_path)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.num_labels == 1
    assert type(theirs).__name__ == type(ours).__name__ == "GPT2ForSequenceClassification"
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ids = torch.tensor([[7, 8, 9, 1], [7, 1, 3, 3]])
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(ids, (ids != 3).long()).logits)


def test_positions():
    assert positions_of(make_config("bloom")) is None
    assert positions_of(make_config("gemma3")) == 256  # of the text model inside


def test_logits_by_hand():
    linear = torch.nn.Linear(1, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0], [-4.0]])
    hidden = torch.tensor([[2.0]])
    assert LMHead(linear)(hidden).tolist() == [[2.0, -8.0]]
    assert LMHead(linear, factor=0.5)(hidden).tolist() == [[1.0, -4.0]]
    capped = LMHead(linear, factor=0.5, cap=2.0)(hidden)  # 2·tanh(1/2), 2·tanh(−2)
    torch.testing.assert_close(capped, torch.tensor([[0.924234, -1.928055]]))

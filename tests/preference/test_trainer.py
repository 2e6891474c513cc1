"""DPO and KTO on our rows: losses and gradients against float64 by hand, and what stays as SFT left it."""

import math

from kochat_trl.models.loading import ADAPTER_WEIGHTS
from kochat_trl.preference.trainer import LabelTrainer, PairTrainer, load_policy_and_reference, with_other_answers
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import ModelArguments
from kochat_trl.settings.preference import DPOConfig, KTOConfig

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from trl.trainer.utils import use_adapter

BETA = 0.3
CLASSES = {"dpo": (PairTrainer, DPOConfig), "kto": (LabelTrainer, KTOConfig)}


@pytest.fixture
def build(tmp_path, tiny_sft, tiny_tokenizer, kochatgpt_files):
    """A trainer as its recipe makes it."""

    def build_trainer(stage, start=tiny_sft, int8=False, lora=True, **config):
        dataset, _ = build_dataset([kochatgpt_files["reward"]], stage, tiny_tokenizer)
        trainer_class, config_class = CLASSES[stage]
        settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        settings |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "beta": BETA}
        settings |= {"per_device_train_batch_size": 6, "max_steps": 3, "learning_rate": 1e-2} | config
        torch.manual_seed(0)
        args = ModelArguments(dtype="float32", use_peft=lora, load_in_8bit=int8, llm_int8_threshold=0.0)
        policy, reference = load_policy_and_reference(start, args, tiny_tokenizer)
        args = config_class(str(tmp_path), **settings)
        return trainer_class(policy, reference, args, train_dataset=dataset, processing_class=tiny_tokenizer)

    return build_trainer


def adapter(trainer, name):
    return get_peft_model_state_dict(trainer.model, adapter_name=name, save_embedding_layers=False)


def moved(trainer, seed=2):
    """A trainer in float64 whose policy has left the reference; without dropout, as in training."""
    torch.manual_seed(seed)
    trainer.model.double()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return trainer


def poisoned(batch):
    """A batch with noise for padding."""
    noise = {name: torch.randint_like(batch[name], 5, 60) for name in batch if name.endswith("input_ids")}
    masks = {name: batch[name.replace("input_ids", "attention_mask")].bool() for name in noise}
    assert any(not mask.all() for mask in masks.values())
    return batch | {name: torch.where(masks[name], batch[name], noise[name]) for name in noise}


def log_ratio(trainer, prompt, answer):
    """log π(answer) − log π_ref(answer): each sequence alone, without padding."""
    ids = torch.tensor([prompt + answer])
    both = []
    for name in ("default", "ref"):
        with use_adapter(trainer.model, name):
            logprobs = trainer.model(input_ids=ids).logits.log_softmax(-1)[0]
        both.append(sum(logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
    return both[0] - both[1].detach()


def loss_and_gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}


def assert_same(found, expected):
    """TRL 1.12 computes in the model's float64; newer ones take the loss in float32."""
    exact = found[0].dtype == torch.float64
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-10 if exact else 1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6 if exact else 1e-3, atol=1e-10 if exact else 1e-5)


PAIR_LOSSES = {
    "sigmoid": lambda chosen, rejected, tokens: -logsigmoid(BETA * (chosen - rejected)),
    "hinge": lambda chosen, rejected, tokens: torch.relu(1 - BETA * (chosen - rejected)),
    "ipo": lambda chosen, rejected, tokens: (chosen / tokens[0] - rejected / tokens[1] - 1 / (2 * BETA)) ** 2,
    "robust": lambda chosen, rejected, tokens: (
        (-0.9 * logsigmoid(BETA * (chosen - rejected)) + 0.1 * logsigmoid(-BETA * (chosen - rejected))) / 0.8
    ),
}


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_the_loss_of_pairs_is_the_paper_s(build, loss):
    """Rafailov et al. 2305.18290, equation 7; IPO's over tokens, as TRL has it; every pair of the six rankings."""
    trainer = moved(build("dpo", loss_type=[loss], label_smoothing=0.1 if loss == "robust" else 0.0))
    assert len(trainer.train_dataset) == 18
    rows = list(trainer.train_dataset)[:7]
    found, gradients = loss_and_gradients(
        trainer, trainer.compute_loss(trainer.model, poisoned(trainer.data_collator(rows)))
    )
    by_hand = [
        PAIR_LOSSES[loss](
            log_ratio(trainer, row["prompt_ids"], row["chosen_ids"]),
            log_ratio(trainer, row["prompt_ids"], row["rejected_ids"]),
            (len(row["chosen_ids"]), len(row["rejected_ids"])),
        )
        for row in rows
    ]
    expected, expected_gradients = loss_and_gradients(trainer, sum(by_hand) / len(rows))
    assert_same((found, gradients), (expected, expected_gradients))
    assert gradients
    assert all(".default." in name for name in gradients)


@pytest.mark.parametrize(("weights", "above"), [((2.0, 0.5), True), ((1.0, 1.0), False)], ids=["KL above 0", "clamped"])
def test_the_loss_of_labels_is_the_paper_s(build, weights, above):
    """Ethayarajh et al. 2402.01306, equation 8, with the KL of the batch's prompts with each other's answers."""
    trainer = build("kto", desirable_weight=weights[0], undesirable_weight=weights[1])
    rows = list(trainer.train_dataset)[:6]
    assert {row["label"] for row in rows} == {True, False}
    answers = [row["completion_ids"] for row in rows]
    others = [answers[-1], *answers[:-1]]

    def mean_log_ratio(seed):
        moved(trainer, seed)
        return sum(log_ratio(trainer, r["prompt_ids"], other) for r, other in zip(rows, others, strict=True)) / len(
            rows
        )

    kl = next(kl for kl in map(mean_log_ratio, range(40)) if (kl > 0.1 if above else kl < -0.1))
    kl = kl.detach().clamp(min=0)
    found, gradients = loss_and_gradients(
        trainer, trainer.compute_loss(trainer.model, poisoned(trainer.data_collator(rows)))
    )
    losses = []
    for row in rows:
        gain = BETA * (log_ratio(trainer, row["prompt_ids"], row["completion_ids"]) - kl)
        losses.append(weights[0] * (1 - gain.sigmoid()) if row["label"] else weights[1] * (1 - (-gain).sigmoid()))
    expected, expected_gradients = loss_and_gradients(trainer, sum(losses) / len(rows))
    assert_same((found, gradients), (expected, expected_gradients))
    assert trainer._metrics["train"]["kl"] + trainer._metrics["eval"]["kl"] == [pytest.approx(kl.item(), rel=1e-5)]


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_policy_starts_as_sft_s_adapter_and_the_reference_stays_it(build, tiny_sft, stage, int8):
    """On one backbone. TRL itself would round the policy to bfloat16 on int8."""
    trainer = build(stage, int8=int8)
    sft = load_file(f"{tiny_sft}/{ADAPTER_WEIGHTS}")
    torch.testing.assert_close(adapter(trainer, "default"), sft, rtol=0, atol=0)
    assert trainer.ref_model is None
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear8bitLt)]
    assert len(layers) == (8 if int8 else 0)  # four in each of two blocks, once
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert len(trained) == len(sft)
    assert all(".default." in name for name in trained)
    batch = trainer.data_collator(list(trainer.train_dataset)[:6])
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx({"dpo": math.log(2), "kto": 0.5}[stage], rel=1e-7)  # all log-ratios are 0
    trainer.train()
    torch.testing.assert_close(adapter(trainer, "ref"), sft, rtol=0, atol=0)
    after = adapter(trainer, "default")
    assert all(not torch.equal(after[name], sft[name]) for name in sft)
    assert {weight.dtype for weight in after.values()} == {torch.float32}


def test_a_whole_sft_model_gets_an_adapter_and_is_the_reference_without_it(build, tiny_base):
    trainer = build("dpo", start=tiny_base)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    with trainer.model.disable_adapter():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (logprobs * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    torch.testing.assert_close(before, expected)


def test_without_lora_the_reference_is_a_model_of_its_own(build, tiny_base):
    trainer = build("dpo", start=tiny_base, lora=False)
    before = {name: weight.clone() for name, weight in trainer.ref_model.state_dict().items()}
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    trainer.train()
    torch.testing.assert_close(trainer.ref_model.state_dict(), before, rtol=0, atol=0)
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_a_row_s_other_answer_is_of_its_batch_and_answers_of_a_ranking_are_not_together():
    rows = [{"prompt_ids": [i // 3], "completion_ids": [i]} for i in range(60)]
    found = list(with_other_answers(Dataset.from_list(rows), batch_size=8, seed=0))
    assert sorted(row["completion_ids"][0] for row in found) == list(range(60))
    for start in range(0, 60, 8):
        batch = found[start : start + 8]
        answers = [row["completion_ids"] for row in batch]
        assert [row["KL_completion_ids"] for row in batch] == [answers[-1], *answers[:-1]]
    own = sum(row["KL_completion_ids"][0] // 3 == row["prompt_ids"][0] for row in found)
    assert own <= 6  # 40 in the order of the file

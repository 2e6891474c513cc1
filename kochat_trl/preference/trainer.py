"""The trainers of DPO and KTO: TRL's, on ids that are joined already, and with the policy and reference exact.

TRL's own put texts through the template as a whole. And of an adapter, which they copy as the frozen reference `ref`,
they round the trained one to bfloat16 where the base is quantized, so that the two differ before the first step.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from kochat_trl.models.fused import fuse_lora
from kochat_trl.models.loading import add_lora, load_causal_lm, require_stage_output
from kochat_trl.settings.keys import ModelArguments

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer, KTOTrainer


def load_policy_and_reference(
    sft_path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Any]:
    """SFT's output as the policy to train, and the reference as TRL's trainers take it.

    A policy with an adapter, SFT's or a new one, has its reference on its own backbone: None. One that is trained whole
    needs another model.
    """
    require_stage_output(sft_path)
    model = load_causal_lm(sft_path, model_args, tokenizer)
    policy = add_lora(model, replace(model_args, model_name_or_path=sft_path))
    return policy, None if model_args.use_peft else load_causal_lm(sft_path, model_args, tokenizer)


class PairTrainer(DPOTrainer):
    """TRL's DPOTrainer on the rows of `build_dataset(…, "dpo", …)`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        start_at_reference(self.model)

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset  # is tokenized, and has no sequence over max_length


class LabelTrainer(KTOTrainer):
    """TRL's KTOTrainer on the rows of `build_dataset(…, "kto", …)`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        start_at_reference(self.model)

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, *unused: Any) -> Any:
        return with_other_answers(dataset, args.per_device_train_batch_size, args.seed)


def start_at_reference(model: Any) -> None:
    """Let an adapter `default` be what its frozen copy `ref` is, bit for bit, in float32; it alone is saved."""
    if not isinstance(model, PeftModel):
        return
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = model.get_parameter(name.replace(".default.", ".ref.")).detach().clone()
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])  # type: ignore[method-assign]
    fuse_lora(model)


def with_other_answers(dataset: Dataset, batch_size: int, seed: int) -> Dataset:
    """The rows in another order, and with each the answer of the row before it in its batch, `KL_completion_ids`.

    KTO takes the KL of policy and reference from prompts with answers to others (2402.01306, section 4.1), which TRL
    pairs so, in the order of the rows. The answers of a ranking stand one after the other: unshuffled they would be
    paired with their own prompt.
    """

    def rotate(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = rows["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    return dataset.shuffle(seed=seed).map(rotate, batched=True, batch_size=batch_size, desc="Pairing for KL")

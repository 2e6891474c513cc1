"""A LoRA adapter → a plain model that any tool opens."""

import logging
import shutil
from pathlib import Path
from typing import Any

from kochat_trl.data.probes import PROBES
from kochat_trl.errors import UserError
from kochat_trl.files import check_output_dir, full_disk_told, set_aside
from kochat_trl.models.heads import has_score_head
from kochat_trl.models.loading import (
    base_of_adapter,
    is_adapter,
    load_adapter,
    load_causal_lm,
    load_reward_model,
    positions_of,
)
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.runs.cards import merged_card
from kochat_trl.settings.keys import ModelArguments

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

TOLERANCE = 1e-3  # of logits, in float32; rounding in W + BA gives about 1e-5
logger = logging.getLogger(__name__)


def merge_adapter(adapter: str, output: str | Path) -> float:
    """Merge the adapter (SFT, PPO or reward, with its score head) into its base, and save the result.

    The base is the one that the adapter's own metadata names, loaded in float32 and never quantized. The merged
    model is loaded again from its files and compared with the unmerged one on real text.

    Writes safetensors, tokenizer, chat template and, for a language model, a generation config. Returns the largest
    absolute difference of a logit. Raises `UserError` if it is above `TOLERANCE`, if `adapter` is none, or if
    `output` is not empty.
    """
    output = Path(output)
    if not is_adapter(adapter):
        raise UserError(f"{adapter}: no adapter_config.json there, so there is nothing to merge")
    check_output_dir(output)
    base, revision = base_of_adapter(adapter)
    tokenizer = load_tokenizer(adapter)
    exact = ModelArguments(dtype="float32", model_revision=revision)
    model: Any
    if has_score_head(adapter):
        auto_class: Any = AutoModelForSequenceClassification
        model = load_reward_model(adapter, exact, tokenizer)
    else:
        auto_class = AutoModelForCausalLM
        model = load_adapter(load_causal_lm(base, exact, tokenizer), adapter)
    model.eval()
    before = _logits(model, tokenizer)
    merged: PreTrainedModel = model.merge_and_unload()
    merged.config._name_or_path = base
    if auto_class is AutoModelForCausalLM:
        merged.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=min(128, (positions_of(merged.config) or 256) // 2),
        )
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    with full_disk_told(output.parent):
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(merged_card(output, adapter, base, auto_class.__name__), encoding="utf-8")

    reloaded, info = auto_class.from_pretrained(unfinished, dtype=torch.float32, output_loading_info=True)
    missing = {key: names for key, names in info.items() if names}
    if missing:
        raise UserError(
            f"the merged model doesn't load back whole: {missing}; don't use what is in {_failed(unfinished)}"
        )
    difference = max(
        float((a - b).abs().max()) for a, b in zip(before, _logits(reloaded.eval(), tokenizer), strict=True)
    )
    logger.info("merged %s into %s: largest difference of a logit %.1e", adapter, base, difference)
    if not difference <= TOLERANCE:
        raise UserError(
            f"a logit of the merged model differs by {difference:.1e} from the unmerged one, more than "
            f"{TOLERANCE:.0e}; don't use what is in {_failed(unfinished)}"
        )
    if output.is_dir():
        output.rmdir()  # it is empty
    unfinished.rename(output)
    return difference


def _failed(unfinished: Path) -> Path:
    """Rename a merge that failed, so that nothing takes it for a finished one."""
    failed = unfinished.with_suffix(".failed")
    set_aside(failed)
    return unfinished.rename(failed)


@torch.no_grad()
def _logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    rows = []
    for prompt, answer in PROBES:
        messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        rows.append(torch.tensor([encode_dialogue(tokenizer, messages)[0]]))
        rows.append(torch.tensor([encode_prompt(tokenizer, prompt)]))
    return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows]

"""A LoRA adapter → a plain model that any tool opens."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from kochat_trl.data.probes import PROBES
from kochat_trl.data.records import conversation
from kochat_trl.errors import UserError
from kochat_trl.files import check_output_dir, full_disk_told, set_aside
from kochat_trl.models.heads import has_score_head, is_read_by_transformers
from kochat_trl.models.loading import base_of_adapter, is_adapter, load_policy, load_reward_model, positions_of
from kochat_trl.models.remote import remote_code_allowed
from kochat_trl.models.template import answer_shape, generation_ids
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.runs.cards import how_to_load, merged_card
from kochat_trl.settings.keys import ModelArguments

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

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
    if not output.name:
        raise UserError(f"--output {output}: give a folder by its name, which is made when all of it is there")
    base, revision = base_of_adapter(adapter)
    tokenizer = load_tokenizer(adapter)
    exact = ModelArguments(dtype="float32", model_revision=revision)
    reward = has_score_head(adapter)
    load = load_reward_model if reward else load_policy
    model: Any = load(adapter, exact, tokenizer).eval().to("cpu")
    before = _logits(model, tokenizer)
    merged: Any = model.merge_and_unload()
    merged.config._name_or_path = base
    if reward:
        merged.config.pad_token_id = merged.config.get_text_config().pad_token_id = pad_apart_from_end(tokenizer)
    else:
        half = (positions_of(merged.config) or 256) // 2
        ids = generation_ids(tokenizer) | {"bos_token_id": None}  # which the chat template writes
        merged.generation_config = GenerationConfig(**ids, max_new_tokens=min(128, half))
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    with full_disk_told(output.parent):
        if reward and merged.causal_lm._auto_class:  # code that comes with the base
            unfinished.mkdir(parents=True)
            custom_object_save(object.__new__(merged.causal_lm), unfinished, config=merged.config)
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        how = how_to_load(output, merged.config, tokenizer, reward)
        (unfinished / "README.md").write_text(merged_card(output, adapter, base, how), encoding="utf-8")

    reloaded, info = _read_back(str(unfinished), merged.config, reward)
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
    with suppress(OSError):
        output.rmdir()  # it is empty, but for how far a run came
    set_aside(output)
    unfinished.rename(output)
    return difference


def pad_apart_from_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Let `tokenizer` pad with a token that ends no answer, and return its id; None if it has no other special token.

    transformers' classifiers read a score at the last token that isn't the pad token: where that ends answers too, they
    read one token before the end. Without a pad id they read at the last token of a single text. No token is added.
    """
    end = answer_shape(tokenizer).end_id
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    pad = next((i for i in (*named, *special) if i is not None and i != end), None)
    if pad is not None and pad != tokenizer.pad_token_id:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(pad))
    return pad


def _read_back(folder: str, config: PretrainedConfig, reward: bool) -> tuple[Any, dict[str, Any]]:
    """The model in a folder as transformers loads it, or as we do where it can't; and what it says of the weights."""
    if reward and not is_read_by_transformers(config):
        model: Any = load_reward_model(folder, ModelArguments(dtype="float32"), load_tokenizer(folder))
        return model.to("cpu"), {}
    auto_class: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    trusted = {"trust_remote_code": remote_code_allowed()}
    return auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trusted)


def _failed(unfinished: Path) -> Path:
    """Rename a merge that failed, so that nothing takes it for a finished one."""
    failed = unfinished.with_suffix(".failed")
    set_aside(failed)
    return unfinished.rename(failed)


@torch.no_grad()
def _logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    rows = []
    for prompt, answer in PROBES:
        messages = conversation(prompt, answer)
        for ids in (encode_dialogue(tokenizer, messages)[0], encode_prompt(tokenizer, messages[:1])):
            rows.append(torch.tensor([ids[-(positions_of(model.config) or len(ids)) :]]))
    return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows]

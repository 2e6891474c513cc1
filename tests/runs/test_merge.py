"""Merging an adapter into bases of all kinds of positions."""

import shutil
from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.files import PROGRESS
from kochat_trl.models.loading import add_lora, load_causal_lm
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GenerationConfig


def test_a_base_without_a_limit_of_positions_is_merged(tiny_base, tiny_tokenizer, tmp_path):
    """BLOOM's positions are told by distances, and its config names no most of them."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=2000, hidden_size=32, n_layer=1, n_head=2, eos_token_id=1, pad_token_id=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    shutil.copy(Path(tiny_base) / "tokenizer.json", tmp_path / "base")
    args = ModelArguments(use_peft=True, lora_r=2, dtype="float32")
    model = add_lora(load_causal_lm(str(tmp_path / "base"), args, tiny_tokenizer), args)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / PROGRESS).write_text("{}")  # of a run that broke off
    assert merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged") < 1e-4
    assert [path.name for path in (tmp_path / "merged-1").iterdir()] == [PROGRESS]
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 128


def test_a_folder_without_a_name_is_refused_before_anything_is_loaded(tiny_reward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--output \.: give a folder by its name"):
        merge_adapter(tiny_reward, ".")
    assert list(tmp_path.iterdir()) == []

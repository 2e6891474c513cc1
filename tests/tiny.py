"""What tests of several rooms share and is no fixture: a few questions, a tiny model and tokenizer, a script's run."""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import patch

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.parse import parse
from kochat_trl.data.readers import read_records
from kochat_trl.errors import run

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]

PAIRS = [
    ("대한민국의 수도는 어디인가요?", "대한민국의 수도는 서울입니다.", "서울 서울 서울"),
    ("일본의 수도는 어디인가요?", "일본의 수도는 도쿄입니다.", "I do not know."),
    ("하나 더하기 둘은 얼마예요?", "하나 더하기 둘은 셋이에요.", "몰라"),
    ("반가워요", "저도 반가워요. 무엇을 도와드릴까요?", "반가"),
    ("높다의 반대말은 뭐야?", "높다의 반대말은 낮다입니다.", "높다 높다 높다"),
    ("강아지는 어떻게 울어요?", "강아지는 멍멍 하고 울어요.", "(멍멍)"),
]


def parsed(path, kind, **options):
    """What a file holds, as records of `kind`."""
    return [record for raw in read_records(path, ReadingOptions(**options)) for record in parse(raw, kind)]


def run_script(path, *arguments):
    """What `python PATH ARGUMENTS` does, in this process: each start of the libraries takes seconds."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with patch.object(sys, "argv", [path, *map(str, arguments)]):
        run(module.main)


def gpt2_config(vocab_size, **changes):
    """A GPT-2 of two layers, 16 wide."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2Config(vocab_size=vocab_size, **shape | changes)


def word_tokenizer(vocab_size, eos=1, pad=0):
    """Its tokens are the words w0, w1, w2 … and it pads on the left."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}))
    special = {"eos_token": f"w{eos}", "pad_token": f"w{pad}"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def random_adapter(load, base, tokenizer, seed, scale=0.1):
    """What fills a folder with an output on `base`: an adapter, with its head if `load` gives one, drawn at random."""
    from kochat_trl.models.loading import add_lora
    from kochat_trl.settings.keys import ModelArguments

    def fill(folder):
        args = ModelArguments(use_peft=True, lora_r=4, dtype="float32")
        torch.manual_seed(seed)
        model = add_lora(load(base, args, tokenizer), args)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return fill


def adapted_modules(model):
    """Names of the modules that an adapter of `model` changes."""
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]

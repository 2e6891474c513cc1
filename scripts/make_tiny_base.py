"""Train a tiny GPT-2, from scratch, on a text file: a stand-in for kogpt2 that needs no download.

    python scripts/make_tiny_base.py --text outputs/demo/data/pretraining.txt --output outputs/demo/base

The folder is laid out as skt/kogpt2-base-v2 is: the same special tokens at the same ids, the same normalization, and
no tokenizer_config.json.
"""

import argparse
import math
from pathlib import Path

from kochat_trl.errors import run
from kochat_trl.files import check_output_dir
from kochat_trl.models.tokenizer import load_tokenizer

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import GPT2Config, GPT2LMHeadModel

SPECIAL_TOKENS = ["<s>", "</s>", "<usr>", "<pad>", "<sys>", "<unk>", "<mask>"]  # in kogpt2's order
END, PAD = SPECIAL_TOKENS.index("</s>"), SPECIAL_TOKENS.index("<pad>")
HEADINGS = ["### Instruction(명령어):\n", "\n\n### Response(응답):"]
VOCABULARY, LAYERS, WIDTH, HEADS, POSITIONS = 2000, 2, 320, 4, 128
STEPS, BATCH, LENGTH, LEARNING_RATE, WEIGHT_DECAY = 500, 16, 64, 6e-3, 0.1


def train_tokenizer(lines: list[str], path: Path) -> None:
    """A BPE of kogpt2's kind: NFKC, and words that begin with ▁.

    The template's headings are in the text that it learns from, so they cost few tokens. While it learns, a colon ends
    a word: no token then holds both the end of a heading and the start of an answer, and the answer's first word, which
    has no ▁, gets tokens of its own.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    colon_ends_word = pre_tokenizers.Split(":", "merged_with_previous")
    space_starts_word = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([colon_ends_word, space_starts_word])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([*lines, *HEADINGS * len(lines)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, help="plain text, one passage a line")
    parser.add_argument("--output", required=True, type=Path, help="empty or new folder")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--steps", default=STEPS, type=int, help=f"of {BATCH} × {LENGTH} tokens")
    arguments = parser.parse_args()
    check_output_dir(arguments.output)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    # 1. Tokenizer.
    lines = arguments.text.read_text(encoding="utf-8").splitlines()
    train_tokenizer(lines, arguments.output / "tokenizer.json")

    # 2. A model with kogpt2's special ids.
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
        activation_function="gelu_pytorch_tanh",  # kogpt2's, in one kernel
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(arguments.output)  # load_tokenizer checks against its config
    tokenizer = load_tokenizer(str(arguments.output))

    # 3. Next-token prediction on passages joined by </s>, in random windows. Muon (Jordan et al., 2024) learns the
    #    blocks' matrices in fewer tokens than AdamW, which has the rest; its updates are scaled to AdamW's size.
    ids = torch.tensor([i for line in lines for i in [*tokenizer.encode(line, add_special_tokens=False), END]])
    matrices = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95), fused=True),
    ]
    progress = trange(arguments.steps, desc="pretraining")
    for step in progress:
        warmup, decay = (step + 1) / 40, 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(warmup, decay)
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        batch = ids[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(arguments.output)
    print(f"Written to {arguments.output}: {model.num_parameters():,} parameters, {len(ids):,} tokens of text.")


if __name__ == "__main__":
    run(main)

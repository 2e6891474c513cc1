"""`kochat generate` and `kochat chat`: a model's answers."""

import argparse
from contextlib import suppress
from typing import Any

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.data.records import Prompt
from kochat_trl.desk.curation.build import read_prompts
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing

PRESETS = "greedy, sample (the whole distribution, as PPO does), beam, top_k, top_p, course (the course's settings)"
MODEL = flag("model", "base, adapter or merged model: folder or Hub name", "MODEL")
FIELDS = "fields of transformers' GenerationConfig over the preset's, such as temperature=0.7 max_new_tokens=96"
SAMPLING = (flag("--set", FIELDS, "FIELD=VALUE", nargs="+", default=[]), opt.SEED)


@command(
    "generate",
    'kochat generate outputs/kogpt2/sft --prompt "불고기용 고기 한우에요?" --compare greedy,beam,top_p '
    "--reward-model outputs/kogpt2/reward",
    MODEL,
    opt.one_of(
        flag("--prompt", "one or more prompts", "TEXT", nargs="+"),
        flag("--file", "any data file that has prompts", "FILE"),
        required=True,
    ),
    opt.one_of(
        flag("--decoding", f"{PRESETS}; default: greedy", "PRESET", default="greedy"),
        flag("--compare", "answer with each, side by side", "PRESET,PRESET"),
    ),
    flag("--reward-model", "with --compare: its score of each answer", "MODEL"),
    flag("--output", "write the answers there, a new file", "OUT.jsonl"),
    flag("--limit", "only the first N records of --file", "N", type=int),
    flag("--system", "a system message for all prompts, in place of those of --file", "TEXT"),
    *SAMPLING,
    *opt.READING,
    *opt.BATCHES,
    opt.TRUST,
)
def generate_file(args: argparse.Namespace) -> None:
    """Answer prompts: with one decoding strategy, or with several side by side.

    --compare shows, for each prompt and strategy, the answer, its tokens, distinct-2 (different pairs of tokens over
    all pairs: low where it repeats itself), the mean log-probability of a token, and the reward model's score.
    """
    from kochat_trl.desk.answers import generate as gen
    from kochat_trl.reward.score import load_scorer

    if args.reward_model and not args.compare:
        raise UserError("--reward-model scores the answers of --compare; for a file of answers: kochat reward score")
    if args.output:
        refuse_existing(args.output)
    if args.limit and not args.file:
        raise UserError("--limit is for --file")
    names = [name.strip() for name in args.compare.split(",")] if args.compare else [args.decoding]
    strategies = {name: gen.decoding(name, args.set) for name in names}
    prompts = [Prompt(text) for text in args.prompt or []]
    if args.file:
        skip = args.invalid_records == "skip"
        prompts, invalid = read_prompts(args.file, skip, args.limit, opt.reading_options(args))
        opt.list_records(invalid)
    if args.system is not None:
        prompts = [prompt._replace(system=args.system) for prompt in prompts]
    model, tokenizer = _policy(args)
    if args.compare:
        scorer = None
        if args.reward_model:
            if opt.tokenizer_of(args.reward_model).get_vocab() != tokenizer.get_vocab():
                raise UserError(f"{args.reward_model} has another vocabulary than {args.model}")
            scorer = load_scorer(args.reward_model, "float32", tokenizer)
        rows = gen.compare_decoding(model, tokenizer, prompts, strategies, args.seed, scorer, args.batch_size)
        gen.print_decodings(rows, console())
    else:
        answers = gen.generate_answers(model, tokenizer, prompts, strategies[names[0]], args.batch_size, args.seed)
        rows = [
            prompt.fields | {"completion": answer.text, "ended": answer.ended}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if not args.output:
            for row in rows:
                print(row["completion"] if len(rows) == 1 else f"{row['prompt']}\n  → {row['completion']}")
    if args.output:
        write_records(args.output, "lines", rows)
        print(f"{len(rows)} answers, written to {args.output}.")


@command(
    "chat",
    "kochat chat outputs/kogpt2/ppo --decoding top_p --set max_new_tokens=96",
    MODEL,
    flag("--decoding", f"{PRESETS}; default: top_p", "PRESET", default="top_p"),
    flag("--system", "a system message, which stands before the conversation", "TEXT"),
    *SAMPLING,
    opt.LOADING,
    opt.TRUST,
)
def chat_with(args: argparse.Namespace) -> None:
    """Talk with a model: it remembers the conversation, and answers word by word.

    /reset starts anew; /exit, Ctrl-D or Ctrl-C ends.
    """
    from kochat_trl.desk.answers.generate import Chat, decoding

    import torch

    settings = decoding(args.decoding, args.set)
    model, tokenizer = _policy(args)
    torch.manual_seed(args.seed)
    chat = Chat(model, tokenizer, settings, args.system)
    print("/reset starts anew, /exit ends.")
    with suppress(EOFError, KeyboardInterrupt):
        while (text := input("> ").strip()) != "/exit":
            if text == "/reset":
                chat.reset()
            elif text:
                try:
                    _, forgotten = chat.say(text)
                except UserError as error:
                    print(f"error: {error}")
                    continue
                if forgotten:
                    print(f"(forgotten, to make room: the first {forgotten} of what you said, and the answers)")
        return
    print()


def _policy(args: argparse.Namespace) -> tuple[Any, Any]:
    from kochat_trl.models.loading import load_policy
    from kochat_trl.reward.score import LOADING
    from kochat_trl.settings.keys import ModelArguments

    tokenizer = opt.tokenizer_of(args.model)
    return load_policy(args.model, ModelArguments(dtype="float32", **LOADING[args.loading]), tokenizer), tokenizer

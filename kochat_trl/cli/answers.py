"""`kochat generate` and `kochat chat`: a model's answers."""

import argparse
from contextlib import suppress

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.data.records import Prompt
from kochat_trl.desk.curation.build import read_prompts
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing


@command(
    "generate",
    'kochat generate outputs/kogpt2/sft --prompt "불고기용 고기 한우에요?" --compare greedy,beam,top_p '
    "--reward-model outputs/kogpt2/reward",
    opt.POLICY,
    opt.one_of(
        flag("--prompt", "one or more prompts", "TEXT", nargs="+"),
        flag("--file", "any data file that has prompts", "FILE"),
        required=True,
    ),
    opt.one_of(
        flag("--decoding", f"{opt.PRESETS}; default: greedy, with --best-of sample", "PRESET"),
        flag("--compare", "answer with each, side by side", "PRESET,PRESET"),
    ),
    flag("--best-of", "of N sampled answers, the one that --reward-model scores highest", "N", type=int),
    flag("--reward-model", "with --compare, its score of each answer; with --best-of, what chooses", "MODEL"),
    flag("--output", "write the answers there, a new file", "OUT.jsonl"),
    flag("--limit", "only the first N records of --file", "N", type=int),
    flag("--system", "a system message for all prompts, in place of those of --file", "TEXT"),
    *opt.SAMPLING,
    *opt.READING,
    *opt.BATCHES,
    opt.TRUST,
)
def generate_file(args: argparse.Namespace) -> None:
    """Answer prompts: with one decoding strategy, or with several side by side.

    --compare shows, for each prompt and strategy, the answer, its tokens, distinct-2 (different pairs of tokens over
    all pairs: low where it repeats itself), the mean log-probability of a token, and the reward model's score.
    --best-of tells the score of the answer that it chose, and how far from the model's own answers that is, as KL.
    """
    from kochat_trl.desk.answers import generate as gen
    from kochat_trl.desk.answers.best_of import best_of, kl_of_best
    from kochat_trl.models.tokenizer import check_same_tokens
    from kochat_trl.reward.score import load_scorer

    if args.reward_model and not args.compare and args.best_of is None:
        raise UserError(
            "--reward-model scores the answers of --compare, or chooses by --best-of; for a file of answers: kochat "
            "reward score"
        )
    if args.best_of is not None and (args.compare or not args.reward_model):
        raise UserError("--best-of N needs --reward-model, which chooses, and one --decoding, not --compare")
    if args.output:
        refuse_existing(args.output)
    if args.limit and not args.file:
        raise UserError("--limit is for --file")
    preset = args.decoding or ("greedy" if args.best_of is None else "sample")
    names = [name.strip() for name in args.compare.split(",")] if args.compare else [preset]
    strategies = {name: gen.decoding(name, **opt.fields_of(args)) for name in names}
    prompts = [Prompt(text) for text in args.prompt or []]
    if args.file:
        skip = args.invalid_records == "skip"
        prompts, invalid = read_prompts(args.file, skip, args.limit, opt.reading_options(args))
        opt.list_records(invalid)
    if args.system is not None:
        prompts = [prompt._replace(system=args.system) for prompt in prompts]
    model, tokenizer = opt.policy_of(args)
    scorer = None
    if args.reward_model:
        check_same_tokens(tokenizer, args.model, opt.tokenizer_of(args.reward_model), args.reward_model)
        scorer = load_scorer(args.reward_model, "float32", tokenizer)
    if args.compare:
        rows = gen.compare_decoding(model, tokenizer, prompts, strategies, args.seed, scorer, args.batch_size)
        gen.print_decodings(rows, console())
    else:
        settings, sampling = strategies[preset], (args.batch_size, args.seed)
        if args.best_of is None:
            answers = gen.generate_answers(model, tokenizer, prompts, settings, *sampling)
            scores: list[dict[str, float]] = [{}] * len(answers)
        else:
            best = best_of(model, tokenizer, prompts, settings, args.best_of, scorer, *sampling)
            answers, scores = [answer for answer, _ in best], [{"score": score} for _, score in best]
        rows = [
            prompt.fields | {"completion": answer.text, "ended": answer.ended} | score
            for prompt, answer, score in zip(prompts, answers, scores, strict=True)
        ]
        if not args.output:
            for row in rows:
                said = row["completion"] + (f"  (score {row['score']:.2f})" if "score" in row else "")
                print(said if len(rows) == 1 else f"{row['prompt']}\n  → {said}")
        if args.best_of is not None:
            kl = kl_of_best(args.best_of)
            print(f"The best of {args.best_of}: KL of at most {kl:.2f} nats from what is sampled, log n − (n−1)/n.")
    if args.output:
        write_records(args.output, "lines", rows)
        print(f"{len(rows)} answers, written to {args.output}.")


@command(
    "chat",
    "kochat chat outputs/kogpt2/ppo --decoding top_p --set max_new_tokens=96",
    opt.POLICY,
    flag("--decoding", f"{opt.PRESETS}; default: top_p", "PRESET", default="top_p"),
    flag("--system", "a system message, which stands before the conversation", "TEXT"),
    *opt.SAMPLING,
    opt.LOADING,
    opt.TRUST,
)
def chat_with(args: argparse.Namespace) -> None:
    """Talk with a model: it remembers the conversation, and answers word by word.

    /reset starts anew; /exit, Ctrl-D or Ctrl-C ends.
    """
    from kochat_trl.desk.answers.generate import Chat, decoding

    import torch

    settings = decoding(args.decoding, **opt.fields_of(args))
    model, tokenizer = opt.policy_of(args)
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

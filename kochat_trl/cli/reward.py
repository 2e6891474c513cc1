"""`kochat reward`: evaluate a reward model, and score answers with it."""

import argparse
import sys
from pathlib import Path

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing

MODEL = flag("model", "adapter with its head, or merged: folder or Hub name", "MODEL")
FATES = (
    "texts of more than --max-length tokens: refuse them (default), or cut their ends or leave them out, and list them"
)
FITTING = (
    opt.choice("--overlong", FATES, "error", "truncate", "drop"),
    flag("--max-length", "tokens of a text, with the template (default: the model's positions)", "N", type=int),
)


@command(
    "reward eval",
    "kochat reward eval outputs/kogpt2/reward outputs/rm_held_out.jsonl",
    MODEL,
    flag("files", "rankings or pairs that it was not trained on", "FILE", nargs="+"),
    *opt.READING,
    flag("--output", "for the two files (default: MODEL/evaluation)", "DIR"),
    *FITTING,
    *opt.BATCHES,
    opt.TRUST,
    flag("--compare-quantized", "score in int8 and nf4 too, and compare with float32", action="store_true"),
)
def evaluate_reward(args: argparse.Namespace) -> None:
    """Say how often a reward model prefers the answer that people prefer, in rankings that it was not trained on.

    Beside it stand rules that need no model, on the same pairs: the longer (or the shorter) answer wins, or the one
    with more Hangul in its letters; a draw counts half. A rule that the model doesn't beat gets a warning. Pairs of one
    prompt are not taken for independent. DIR/evaluation.json has all figures; DIR/reliability.png shows whether the
    model is as often right as it is sure.
    """
    from kochat_trl.desk.evaluation.metrics import agreement, evaluate
    from kochat_trl.desk.evaluation.scoring import read_rankings, score_rankings
    from kochat_trl.desk.evaluation.view import output_files, print_evaluation, write_evaluation
    from kochat_trl.reward.score import LOADING

    if args.output is None and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is not a local folder: say with --output where to write")
    folder = args.output or Path(args.model) / "evaluation"
    output_files(folder)
    rankings, report = read_rankings(args.model, args.files, opt.data_arguments(args), args.max_length)
    print(report, end="", file=sys.stderr)
    loadings = dict.fromkeys([args.loading, *(LOADING if args.compare_quantized else [])])
    scored = {name: score_rankings(args.model, rankings, name, args.batch_size) for name in loadings}
    exact = scored.get("float32") if args.compare_quantized else None
    quantized = {name: agreement(exact, others) for name, others in scored.items() if exact and name != "float32"}
    evaluation = evaluate(scored[args.loading])
    print_evaluation(evaluation, quantized, console())
    asked = ("model", "files", "ranking_order", "overlong", "max_length", "loading")
    facts = {name: getattr(args, name) for name in asked}
    facts |= {"records_left_out": len(report.left_out), "records_in_part": len(report.in_part)}
    write_evaluation(folder, evaluation, quantized, facts)
    print(f"Written to {folder}: evaluation.json and reliability.png.")


@command(
    "reward score",
    "kochat reward score outputs/kogpt2/reward data/kochatgpt/kochatgpt_1_SFT.jsonl --output outputs/scores.jsonl",
    MODEL,
    flag("file", "prompts with answers, dialogues, rankings or pairs", "FILE"),
    opt.NEW_JSONL,
    *opt.READING,
    *FITTING,
    *opt.BATCHES,
    opt.TRUST,
)
def score_file(args: argparse.Namespace) -> None:
    """Write the reward model's score of each answer: JSON lines with prompt, completion and score.

    An answer of a ranking has its rank too, 0 for the best, null if it has none. A dialogue of several exchanges has
    messages, and the score of the whole.
    """
    from kochat_trl.desk.evaluation.scoring import read_answers, score_texts

    refuse_existing(args.output)
    texts, report = read_answers(args.model, args.file, opt.data_arguments(args), args.max_length)
    print(report, end="", file=sys.stderr)
    rows = score_texts(args.model, texts, args.loading, args.batch_size)
    written = write_records(args.output, "lines", rows)
    print(f"{written} scores, written to {args.output}.")

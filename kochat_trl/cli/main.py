"""`kochat`: the commands beside the recipes.

What a command needs is imported when it runs, so that `kochat --help` answers at once.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kochat_trl.data.readers import read_records
from kochat_trl.data.records import RawRecord, RecordError, kind_of, parse
from kochat_trl.desk.curation.faults import FAULTS
from kochat_trl.errors import UserError, run

KOGPT2 = "skt/kogpt2-base-v2"


def main() -> None:
    """The entry point of `kochat`."""
    arguments = make_parser().parse_args()
    run(lambda: arguments.command(arguments))


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; the result's `command` is the function that runs it."""
    parser = argparse.ArgumentParser(prog="kochat", description="RLHF for small Korean language models.")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    data = groups.add_parser("data", help="check, show, convert, clean and build data files")
    _add_data_commands(data.add_subparsers(metavar="COMMAND", required=True))
    reward = groups.add_parser("reward", help="evaluate a reward model, and score answers with it")
    _add_reward_commands(reward.add_subparsers(metavar="COMMAND", required=True))
    _add_generating_commands(groups)
    _add_pipeline_command(groups)
    _add_memory_command(groups)
    return parser


def _add(commands: Any, function: Callable[..., None], name: str, example: str, epilog: str = "") -> Any:
    """A command that runs `function`, described by its docstring, with an example that works as it stands."""
    description = (function.__doc__ or "").strip()
    parser = commands.add_parser(
        name,
        help=description.splitlines()[0],
        description=description,
        epilog=f"{epilog}example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _add_reading(parser: Any, with_kind: bool = True) -> None:
    kinds = ("sft", "preference", "prompt")
    if with_kind:
        parser.add_argument("--kind", choices=kinds, help="what the records are; told from their fields unless given")
    parser.add_argument(
        "--ranking-order",
        choices=("best_first", "rank_of"),
        default="best_first",
        help="how `ranking` is read: completion indices, best first (default), or the rank of each completion",
    )


def _add_pairs(parser: Any) -> None:
    choices = ("all", "best_vs_rest", "adjacent")
    parser.add_argument("--pairs", choices=choices, default="all", help="which pairs of a ranking (default: all)")


def _add_data_commands(commands: Any) -> None:
    check = _add(
        commands,
        check_data,
        "check",
        f"kochat data check data/kochatgpt/kochatgpt_3_PPO.jsonl --tokenizer {KOGPT2} --max-length 96",
    )
    check.add_argument("files", nargs="+", metavar="FILE")
    _add_reading(check)
    check.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub name; counts tokens too")
    check.add_argument(
        "--max-length", type=int, metavar="N", help="count the records of more tokens, with the template"
    )
    check.add_argument("--json", action="store_true", help="print JSON, for programs")

    show = _add(
        commands,
        show_data,
        "show",
        f"kochat data show data/kochatgpt/kochatgpt_2_RM.jsonl --index 3 --tokenizer {KOGPT2}",
    )
    show.add_argument("file", nargs="?", metavar="FILE")
    show.add_argument("--index", type=int, default=0, metavar="N", help="record, or first row of the batch, from 0")
    _add_reading(show)
    _add_pairs(show)
    show.add_argument("--tokenizer", metavar="MODEL", help="folder or Hub name; shows tokens, ids and labels")
    show.add_argument("--config", metavar="YAML", help="instead of FILE: show a batch of this config's training data")
    show.add_argument("--stage", choices=("sft", "reward", "ppo"), help="the recipe that --config is for")

    convert = _add(
        commands,
        convert_data,
        "convert",
        "kochat data convert data/kochatgpt/kochatgpt_2_RM.jsonl --to preference --invalid-records skip "
        "--output outputs/pairs.jsonl",
    )
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--to", required=True, choices=("sft", "preference", "prompt"))
    convert.add_argument("--output", required=True, metavar="OUT.jsonl", help="a new file")
    _add_reading(convert, with_kind=False)
    _add_pairs(convert)
    convert.add_argument("--rank-margins", action="store_true", help="give each pair the distance of its ranks")
    convert.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="apply the chat template, or leave the texts plain (default: apply)",
    )
    convert.add_argument("--tokenizer", metavar="MODEL", help="whose template to apply; KoChatGPT's unless given")
    _add_invalid(convert)

    fixes = "\n".join(f"  {f.name:<16}{f.says}: {f.fix}{'' if f.default else ' (*)'}" for f in FAULTS.values())
    clean = _add(
        commands,
        clean_data,
        "clean",
        "kochat data clean data/kochatgpt/kochatgpt_3_PPO.jsonl --output outputs/clean_prompts.jsonl",
        f"fixes, all applied unless --fix names some; (*) only if named:\n{fixes}\n\n",
    )
    clean.add_argument("file", metavar="FILE")
    clean.add_argument("--output", required=True, metavar="OUT", help="a new file, in KoChatGPT's shape")
    clean.add_argument("--report", metavar="REPORT.jsonl", help="a new file (default: OUT.report.jsonl)")
    clean.add_argument("--fix", nargs="+", metavar="NAME", help="apply these fixes only")
    _add_reading(clean)
    clean.add_argument("--tokenizer", metavar="MODEL", help="for the fixes that look at tokens")
    clean.add_argument("--max-length", type=int, metavar="N", help="for the fix `overlong`")
    clean.add_argument("--against", nargs="+", default=[], metavar="FILE", help="drop prompts that are in these files")

    prompts = _add(
        commands,
        make_prompts,
        "prompts",
        "kochat data prompts data/kochatgpt/kochatgpt_1_SFT.jsonl --output outputs/prompts.jsonl",
    )
    prompts.add_argument("file", metavar="FILE")
    prompts.add_argument("--output", required=True, metavar="OUT.jsonl", help="a new file")
    _add_invalid(prompts)

    rank = _add(
        commands,
        make_rankings,
        "rank",
        "kochat data rank data/kochatgpt/kochatgpt_3_PPO.jsonl --sources outputs/kogpt2/sft skt/kogpt2-base-v2 "
        "--limit 8 --output outputs/rankings.jsonl",
    )
    rank.add_argument("file", metavar="PROMPTS", help="any data file that has prompts")
    rank.add_argument(
        "--sources",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="two or more, best first: models or adapters (folder or Hub name), or files with an answer to each prompt",
    )
    rank.add_argument("--reward-model", metavar="MODEL", help="rank by its scores instead of the sources' order")
    rank.add_argument("--output", required=True, metavar="OUT.jsonl", help="a new file")
    rank.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    rank.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (default: 64)")
    rank.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    rank.add_argument("--seed", type=int, default=0, help="of the answers and of the completions' order (default: 0)")
    _add_invalid(rank)

    split = _add(
        commands,
        split_data,
        "split",
        "kochat data split data/kochatgpt/kochatgpt_2_RM.jsonl --train outputs/rm_train.jsonl "
        "--held-out outputs/rm_held_out.jsonl",
    )
    split.add_argument("file", metavar="FILE")
    split.add_argument("--train", required=True, metavar="OUT", help="a new file")
    split.add_argument("--held-out", required=True, metavar="OUT", help="a new file")
    split.add_argument("--fraction", type=float, default=0.1, help="of the records to hold out (default: 0.1)")
    split.add_argument("--seed", type=int, default=0, help="default: 0")


def _add_reward_commands(commands: Any) -> None:
    evaluate = _add(
        commands, evaluate_reward, "eval", "kochat reward eval outputs/kogpt2/reward outputs/rm_held_out.jsonl"
    )
    evaluate.add_argument("model", metavar="MODEL", help="adapter with its head, or merged: folder or Hub name")
    evaluate.add_argument("files", nargs="+", metavar="FILE", help="rankings or pairs that it was not trained on")
    _add_reading(evaluate, with_kind=False)
    evaluate.add_argument("--output", metavar="DIR", help="for the two files (default: MODEL/evaluation)")
    _add_loading(evaluate)
    evaluate.add_argument(
        "--compare-quantized", action="store_true", help="score in int8 and nf4 too, and compare with float32"
    )
    _add_invalid(evaluate)

    score = _add(
        commands,
        score_file,
        "score",
        "kochat reward score outputs/kogpt2/reward data/kochatgpt/kochatgpt_1_SFT.jsonl --output outputs/scores.jsonl",
    )
    score.add_argument("model", metavar="MODEL", help="adapter with its head, or merged: folder or Hub name")
    score.add_argument("file", metavar="FILE", help="prompts with answers, dialogues, rankings or pairs")
    score.add_argument("--output", required=True, metavar="OUT.jsonl", help="a new file")
    _add_reading(score, with_kind=False)
    _add_loading(score)
    _add_invalid(score)


def _add_generating_commands(commands: Any) -> None:
    presets = "greedy, sample (the whole distribution, as PPO does), beam, top_k, top_p, course (the course's settings)"
    generate = _add(
        commands,
        generate_file,
        "generate",
        'kochat generate outputs/kogpt2/sft --prompt "불고기용 고기 한우에요?" --compare greedy,beam,top_p '
        "--reward-model outputs/kogpt2/reward",
    )
    generate.add_argument("model", metavar="MODEL", help="base, adapter or merged model: folder or Hub name")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument("--file", metavar="FILE", help="any data file that has prompts")
    strategy = generate.add_mutually_exclusive_group()
    strategy.add_argument("--decoding", default="greedy", metavar="PRESET", help=f"{presets}; default: greedy")
    strategy.add_argument("--compare", metavar="PRESET,PRESET", help="answer with each, side by side")
    generate.add_argument("--reward-model", metavar="MODEL", help="with --compare: its score of each answer")
    generate.add_argument("--output", metavar="OUT.jsonl", help="write the answers there, a new file")
    generate.add_argument("--limit", type=int, metavar="N", help="only the first N records of --file")
    _add_settings(generate)
    _add_loading(generate)
    _add_invalid(generate)

    chat = _add(commands, chat_with, "chat", "kochat chat outputs/kogpt2/ppo --decoding top_p --set max_new_tokens=96")
    chat.add_argument("model", metavar="MODEL", help="base, adapter or merged model: folder or Hub name")
    chat.add_argument("--decoding", default="top_p", metavar="PRESET", help=f"{presets}; default: top_p")
    _add_settings(chat)
    _add_loading(chat, batches=False)


def _add_pipeline_command(commands: Any) -> None:
    pipeline = _add(commands, run_pipeline, "run", "kochat run configs/kogpt2 --dry-run")
    report = _add(commands, make_report, "report", "kochat report outputs/kogpt2/ppo --limit 8")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="the output folder of a PPO run, or of several from one SFT model"
    )
    report.add_argument(
        "--prompts", metavar="FILE", help="any file of prompts (default: SFT's eval_files, or else PPO's)"
    )
    report.add_argument("--limit", type=int, default=200, metavar="N", help="prompts to ask (default: 200)")
    report.add_argument("--output", metavar="DIR", help="for report.html and report.json (of one run: RUN/report)")
    report.add_argument("--seed", type=int, default=0, help="of the answers (default: 0)")

    pipeline.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="a folder with a config for each stage, or an experiment"
    )
    pipeline.add_argument("--from", dest="first", metavar="STAGE", help="run this stage and those after it again")
    pipeline.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    pipeline.add_argument(
        "--seeds", type=int, nargs="+", default=[], metavar="N", help="run each config with each, in a folder for each"
    )
    pipeline.add_argument(
        "--accelerate", metavar="YAML", help="launcher config (default: configs/accelerate/one_gpu.yaml, or cpu.yaml)"
    )


def _add_memory_command(commands: Any) -> None:
    memory = _add(commands, plan, "memory", "kochat memory configs/kogpt2 --gpu-gb 8")
    memory.add_argument("config", metavar="CONFIG", help="a folder with a config for each stage, or an experiment")
    memory.add_argument(
        "--gpu-gb", type=float, nargs="+", metavar="N", help="sizes of GPUs to fit (default: 6 8 12 16 24)"
    )


def _add_settings(parser: Any) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of transformers' GenerationConfig over the preset's, such as temperature=0.7 max_new_tokens=96",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def _add_loading(parser: Any, batches: bool = True) -> None:
    loading = parser.add_mutually_exclusive_group()
    loading.add_argument("--load-in-8bit", action="store_const", dest="loading", const="int8", help="weights in int8")
    loading.add_argument("--load-in-4bit", action="store_const", dest="loading", const="nf4", help="weights in nf4")
    parser.set_defaults(loading="float32")
    if batches:
        parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts at once (default: 64)")


def _add_invalid(parser: Any) -> None:
    parser.add_argument(
        "--invalid-records",
        choices=("error", "skip"),
        default="error",
        help="refuse broken records (default), or leave them out and list them",
    )


def check_data(arguments: argparse.Namespace) -> None:
    """Say what is in data files and what is wrong with it.

    Exits with 1 if there is an error, which the recipes would refuse; with 0 if there are warnings only.
    """
    from kochat_trl.desk.curation.audit import check_files
    from kochat_trl.desk.curation.audit_view import print_report

    report = check_files(
        arguments.files,
        kind=arguments.kind,
        order=arguments.ranking_order,
        tokenizer=_tokenizer(arguments.tokenizer),
        max_length=arguments.max_length,
    )
    if arguments.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        print_report(report, _console())
    sys.exit(1 if report.errors else 0)


def show_data(arguments: argparse.Namespace) -> None:
    """Show a record, or the batch of a config, as the model sees it: template, tokens, ids, labels, pairs."""
    if (arguments.file is None) == (arguments.config is None) or (arguments.config and not arguments.stage):
        raise UserError("give either FILE, or --config with --stage")
    if arguments.config:
        from kochat_trl.desk.curation.show import show_batch
        from kochat_trl.settings.parse import parse_arguments

        args = parse_arguments(arguments.stage, arguments.config, [])
        show_batch(arguments.stage, args, arguments.index, _console())
        return
    from kochat_trl.desk.curation.show import show_record
    from kochat_trl.models.tokenizer import template_tokenizer

    raw = _record_at(arguments.file, arguments.index)
    kind = arguments.kind or kind_of(raw) or "sft"  # nothing that is known: the error says what is
    record = parse(raw, kind, arguments.ranking_order)
    tokenizer = _tokenizer(arguments.tokenizer)
    reading = (arguments.ranking_order, arguments.pairs)
    show_record(raw, record, *reading, tokenizer or template_tokenizer(), tokenizer is not None, _console())


def convert_data(arguments: argparse.Namespace) -> None:
    """Write a data file in TRL's dataset formats, as JSON lines of text that any other tool can use.

    sft: prompt and completion (`text` for a dialogue of several exchanges; `messages` without template).
    preference: prompt, chosen, rejected, and the group that pairs of one ranking share. prompt: prompt.
    """
    from kochat_trl.data.parsing import read_parsed
    from kochat_trl.data.writers import write_records
    from kochat_trl.files import refuse_existing
    from kochat_trl.models.tokenizer import template_tokenizer
    from kochat_trl.rows.rows import text_rows
    from kochat_trl.settings.keys import DataArguments

    refuse_existing(arguments.output)
    options = DataArguments(
        ranking_order=arguments.ranking_order, pairs=arguments.pairs, rank_margins=arguments.rank_margins
    )
    tokenizer = (_tokenizer(arguments.tokenizer) or template_tokenizer()) if arguments.template else None
    invalid: list[RecordError] = []
    records = 0

    def rows() -> Any:
        nonlocal records
        read = partial(parse, kind=arguments.to, order=options.ranking_order)
        for source, record in read_parsed([arguments.file], read, invalid, arguments.invalid_records == "skip"):
            records += 1
            yield from text_rows(record, source.index, options, tokenizer)

    written = write_records(arguments.output, "lines", rows())
    _list_invalid(invalid)
    print(f"{written} rows from {records} records, written to {arguments.output}.")


def clean_data(arguments: argparse.Namespace) -> None:
    """Mend or drop faulty records: writes a new file in KoChatGPT's shape, and a report of every change."""
    from kochat_trl.desk.curation.clean import clean_file, print_summary

    report = arguments.report or f"{arguments.output}.report.jsonl"
    summary = clean_file(
        arguments.file,
        arguments.output,
        report=report,
        fixes=arguments.fix,
        kind=arguments.kind,
        order=arguments.ranking_order,
        tokenizer=_tokenizer(arguments.tokenizer),
        max_length=arguments.max_length,
        against=arguments.against,
    )
    print_summary(summary, _console())
    print(f"Written to {arguments.output}; what was changed or dropped is in {report}.")


def make_prompts(arguments: argparse.Namespace) -> None:
    """Make a file of PPO prompts from the prompts of any data file, such as the SFT file or a seed file."""
    from kochat_trl.data.writers import write_records
    from kochat_trl.desk.curation.build import read_prompts
    from kochat_trl.files import refuse_existing

    refuse_existing(arguments.output)
    prompts, invalid = read_prompts(arguments.file, arguments.invalid_records == "skip")
    write_records(arguments.output, "array", ({"prompt": prompt} for prompt in prompts))
    _list_invalid(invalid)
    print(f"{len(prompts)} prompts, written to {arguments.output}.")


def make_rankings(arguments: argparse.Namespace) -> None:
    """Make a ranking file from the answers of several models: what KoChatGPT's stage 2 trains on."""
    from kochat_trl.data.writers import write_records
    from kochat_trl.desk.curation.build import gather_answers, gather_scores, rank_answers, read_prompts
    from kochat_trl.files import refuse_existing

    refuse_existing(arguments.output)
    if len(arguments.sources) < 2:
        raise UserError("a ranking takes two --sources or more")
    prompts, invalid = read_prompts(arguments.file, arguments.invalid_records == "skip", arguments.limit)
    settings = (arguments.max_new_tokens, arguments.temperature)
    answers = [
        gather_answers(source, prompts, *settings, arguments.seed + i) for i, source in enumerate(arguments.sources)
    ]
    scores = gather_scores(arguments.reward_model, prompts, answers) if arguments.reward_model else None
    records, left_out = rank_answers(prompts, answers, arguments.seed, scores)
    _list_invalid(invalid)
    for prompt in left_out:
        print(f"left out, as no answer to it is better than another: {prompt!r}")
    if not records:
        raise UserError("no prompt has an answer that is better than another")
    write_records(arguments.output, "array", records)
    print(f"{len(records)} rankings, written to {arguments.output}.")


def split_data(arguments: argparse.Namespace) -> None:
    """Split a data file in two by a seed; records with the same prompt stay together."""
    from kochat_trl.desk.curation.build import split_file

    settings = (arguments.fraction, arguments.seed)
    train, held_out = split_file(arguments.file, arguments.train, arguments.held_out, *settings)
    print(f"{train} records, written to {arguments.train}; {held_out}, written to {arguments.held_out}.")


def evaluate_reward(arguments: argparse.Namespace) -> None:
    """Say how often a reward model prefers the answer that people prefer, in rankings that it was not trained on.

    Beside it stand rules that need no model, on the same pairs: the longer (or the shorter) answer wins, or the one
    with more Hangul in its letters; a draw counts half. A rule that the model doesn't beat gets a warning. Pairs of one
    prompt are not taken for independent. DIR/evaluation.json has all figures; DIR/reliability.png shows whether the
    model is as often right as it is sure.
    """
    from kochat_trl.desk.evaluation import evaluate as ev
    from kochat_trl.reward.score import LOADING

    if arguments.output is None and not Path(arguments.model).is_dir():
        raise UserError(f"{arguments.model} is not a local folder: say with --output where to write")
    folder = arguments.output or Path(arguments.model) / "evaluation"
    ev.output_files(folder)
    rankings, invalid = ev.read_rankings(arguments.files, arguments.ranking_order, arguments.invalid_records == "skip")
    _list_invalid(invalid)
    loadings = dict.fromkeys([arguments.loading, *(LOADING if arguments.compare_quantized else [])])
    scored = {name: ev.score_rankings(arguments.model, rankings, name, arguments.batch_size) for name in loadings}
    exact = scored.get("float32") if arguments.compare_quantized else None
    quantized = {name: ev.agreement(exact, others) for name, others in scored.items() if exact and name != "float32"}
    evaluation = ev.evaluate(scored[arguments.loading])
    ev.print_evaluation(evaluation, quantized, _console())
    facts = {"model": arguments.model, "files": arguments.files, "ranking_order": arguments.ranking_order}
    facts |= {"loading": arguments.loading, "records_left_out": len(invalid)}
    ev.write_evaluation(folder, evaluation, quantized, facts)
    print(f"Written to {folder}: evaluation.json and reliability.png.")


def score_file(arguments: argparse.Namespace) -> None:
    """Write the reward model's score of each answer: JSON lines with prompt, completion and score.

    An answer of a ranking has its rank too, 0 for the best, null if it has none. A dialogue of several exchanges has
    messages, and the score of the whole.
    """
    from kochat_trl.data.writers import write_records
    from kochat_trl.desk.evaluation.evaluate import read_answers, score_records
    from kochat_trl.files import refuse_existing

    refuse_existing(arguments.output)
    records, invalid = read_answers(arguments.file, arguments.ranking_order, arguments.invalid_records == "skip")
    _list_invalid(invalid)
    rows = score_records(arguments.model, records, arguments.loading, arguments.batch_size)
    written = write_records(arguments.output, "lines", rows)
    print(f"{written} scores, written to {arguments.output}.")


def generate_file(arguments: argparse.Namespace) -> None:
    """Answer prompts: with one decoding strategy, or with several side by side.

    --compare shows, for each prompt and strategy, the answer, its tokens, distinct-2 (different pairs of tokens over
    all pairs: low where it repeats itself), the mean log-probability of a token, and the reward model's score.
    """
    from kochat_trl.data.writers import write_records
    from kochat_trl.desk.answers import generate as gen
    from kochat_trl.files import refuse_existing

    if arguments.reward_model and not arguments.compare:
        raise UserError("--reward-model scores the answers of --compare; for a file of answers: kochat reward score")
    if arguments.output:
        refuse_existing(arguments.output)
    if arguments.limit and not arguments.file:
        raise UserError("--limit is for --file")
    names = [name.strip() for name in arguments.compare.split(",")] if arguments.compare else [arguments.decoding]
    strategies = {name: gen.decoding(name, arguments.set) for name in names}
    prompts: list[str] = arguments.prompt
    invalid: list[RecordError] = []
    if arguments.file:
        from kochat_trl.desk.curation.build import read_prompts

        prompts, invalid = read_prompts(arguments.file, arguments.invalid_records == "skip", arguments.limit)
    _list_invalid(invalid)
    model, tokenizer = _policy(arguments)
    if arguments.compare:
        scorer = None
        if arguments.reward_model:
            from kochat_trl.models.tokenizer import load_tokenizer
            from kochat_trl.reward.score import load_scorer

            if load_tokenizer(arguments.reward_model).get_vocab() != tokenizer.get_vocab():
                raise UserError(f"{arguments.reward_model} has another vocabulary than {arguments.model}")
            scorer = load_scorer(arguments.reward_model, "float32", tokenizer)
        settings = (arguments.seed, scorer, arguments.batch_size)
        rows = gen.compare_decoding(model, tokenizer, prompts, strategies, *settings)
        gen.print_comparison(rows, _console())
    else:
        answers = gen.generate_answers(
            model, tokenizer, prompts, strategies[names[0]], arguments.batch_size, arguments.seed
        )
        rows = [{"prompt": p, "completion": a.text, "ended": a.ended} for p, a in zip(prompts, answers, strict=True)]
        if not arguments.output:
            for row in rows:
                print(row["completion"] if len(rows) == 1 else f"{row['prompt']}\n  → {row['completion']}")
    if arguments.output:
        write_records(arguments.output, "lines", rows)
        print(f"{len(rows)} answers, written to {arguments.output}.")


def chat_with(arguments: argparse.Namespace) -> None:
    """Talk with a model: it remembers the conversation, and answers word by word.

    /reset starts anew; /exit, Ctrl-D or Ctrl-C ends.
    """
    from kochat_trl.desk.answers.generate import Chat, decoding

    import torch

    settings = decoding(arguments.decoding, arguments.set)
    model, tokenizer = _policy(arguments)
    torch.manual_seed(arguments.seed)
    chat = Chat(model, tokenizer, settings)
    print("/reset starts anew, /exit ends.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            try:
                _, forgotten = chat.say(text)
            except UserError as error:
                print(f"error: {error}")
                continue
            except KeyboardInterrupt:
                print()
                return
            if forgotten:
                print(f"(forgotten, to make room: the first {forgotten} of what you said, and the answers)")


def run_pipeline(arguments: argparse.Namespace) -> None:
    """Run SFT, reward model, PPO, merge and report, one after the other; the same command goes on where it stopped.

    A config is a folder with sft.yaml, reward.yaml and ppo.yaml, or an experiment: a file that extends such a folder.
    A finished stage is kept, one that broke off goes on from its last checkpoint, and what depends on a stage that
    runs runs again. An output that is in the way is renamed. Several configs or seeds end with a table.
    """
    from kochat_trl.desk.workflow.pipeline import make_plan, make_plans, print_plan, run_plan

    console = _console()
    many = len(arguments.configs) > 1 or bool(arguments.seeds)
    if many and arguments.first:
        raise UserError("--from is for one config, without --seeds")
    if many:
        plans = make_plans(arguments.configs, arguments.seeds, arguments.accelerate)
    else:
        plans = [make_plan(arguments.configs[0], arguments.first, None, arguments.accelerate)]
    steps = [step for plan in plans for step in plan.steps]
    print_plan(steps, console)
    if arguments.dry_run:
        return
    run_plan(steps, console)
    if many:
        from kochat_trl.desk.workflow.comparison import compare, print_comparison

        print_comparison(compare(plans), console)
        return
    outputs = plans[0].outputs
    print(f"What PPO changed: {outputs['report']}/report.html")
    print(f"Talk with the model: kochat chat {outputs.get('merge', outputs['ppo'])}")


def make_report(arguments: argparse.Namespace) -> None:
    """Show what a PPO run changed: base, SFT and PPO side by side, in one page that needs no network.

    The page has every model's answers to held-out prompts with the reward model's score, win rates, KL, likeness to
    references, curves of all stages, and what to worry about. report.json has the same as numbers.
    """
    from kochat_trl.desk.workflow.report import build_report, write_report

    if len(arguments.runs) > 1 and not arguments.output:
        raise UserError("say with --output where the page of several runs goes")
    report = build_report(arguments.runs, arguments.prompts, arguments.limit, arguments.seed)
    page = write_report(report, arguments.output or Path(arguments.runs[0]) / "report")
    for worry in report["worries"]:
        run = f"{worry['run']}: " if len(report["runs"]) > 1 else ""
        print(f"! {run}{worry['sign']}\n  {worry['advice']}")
    print(f"Written to {page}, and report.json beside it.")


def plan(arguments: argparse.Namespace) -> None:
    """Say how much memory SFT, reward model and PPO take, and what fits a GPU, before anything is loaded.

    Of the base model only config.json is read. Texts are as long as the config allows, so a real run takes less. The
    figures are what the tensors take; a GPU needs about 1 GB more, which the second table leaves for it.
    """
    from kochat_trl.desk.workflow.memory import CARDS, plan_memory, print_memory

    one, planned = plan_memory(arguments.config, rows=1), plan_memory(arguments.config)
    many = plan_memory(arguments.config, rows=2 * max(footprint.rows for footprint in planned))
    print_memory(one, planned, many, arguments.gpu_gb or CARDS, _console())


def _policy(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from kochat_trl.models.loading import load_policy
    from kochat_trl.models.tokenizer import load_tokenizer
    from kochat_trl.reward.score import LOADING
    from kochat_trl.settings.keys import ModelArguments

    tokenizer = load_tokenizer(arguments.model)
    settings: dict[str, Any] = LOADING[arguments.loading]
    return load_policy(arguments.model, ModelArguments(dtype="float32", **settings), tokenizer), tokenizer


def _record_at(file: str, index: int) -> RawRecord:
    count = 0
    for raw in read_records(file):
        if count == index:
            return raw
        count += 1
    raise UserError(f"{file}: there is no record {index}: it has {count}, from 0")


def _list_invalid(invalid: list[RecordError]) -> None:
    for error in invalid:
        print(f"left out: {error}", file=sys.stderr)


def _tokenizer(path: str | None) -> Any:
    if path is None:
        return None
    from kochat_trl.models.tokenizer import load_tokenizer

    return load_tokenizer(path)


def _console() -> Any:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()

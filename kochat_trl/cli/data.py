"""`kochat data`: check, show, convert, clean and build data files."""

import argparse
import json
import sys
from itertools import chain, islice
from statistics import fmean
from typing import Any

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.readers import read_records
from kochat_trl.data.reading import read_as
from kochat_trl.data.records import RecordError
from kochat_trl.desk.curation.build import gather_answers, gather_scores, rank_answers, read_prompts, split_file
from kochat_trl.desk.curation.faults import FAULTS
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing

FIXES = "\n".join(f"  {f.name:<16}{f.says}: {f.fix}{'' if f.default else ' (*)'}" for f in FAULTS.values())
FILE = flag("file", metavar="FILE")
SOURCES = "two or more, best first: models or adapters (folder or Hub name), or files with an answer to each prompt"
SAMPLED_TO = "write all, ranked (default), the best, or the best and the worst as chosen and rejected"
TEMPLATED = "apply the chat template, or leave the texts plain (default: apply)"


@command(
    "data check",
    f"kochat data check data/kochatgpt/kochatgpt_3_PPO.jsonl --tokenizer {opt.KOGPT2} --max-length 96",
    flag("files", metavar="FILE", nargs="+"),
    opt.KIND,
    *opt.READING,
    flag("--tokenizer", "folder or Hub name; counts tokens too", "MODEL"),
    opt.TRUST,
    flag("--max-length", "count the records of more tokens, with the template", "N", type=int),
    flag("--json", "print JSON, for programs", action="store_true"),
)
def check_data(args: argparse.Namespace) -> None:
    """Say what is in data files and what is wrong with it.

    Exits with 1 if there is an error, which the recipes would refuse; with 0 if there are warnings only.
    """
    from kochat_trl.desk.curation.audit import check_files
    from kochat_trl.desk.curation.view import print_report

    report = check_files(args.files, **_auditing(args))
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        print_report(report, console())
    sys.exit(1 if report.errors else 0)


@command(
    "data show",
    f"kochat data show data/kochatgpt/kochatgpt_2_RM.jsonl --index 3 --tokenizer {opt.KOGPT2}",
    flag("file", metavar="FILE", nargs="?"),
    flag("--index", "record, or first row of the batch, from 0", "N", type=int, default=0),
    opt.KIND,
    *opt.READING,
    opt.PAIRS,
    flag("--tokenizer", "folder or Hub name; shows tokens, ids and labels", "MODEL"),
    opt.TRUST,
    flag("--config", "instead of FILE: show a batch of this config's training data", "YAML"),
    flag("--stage", "the recipe that --config is for", choices=("sft", "reward", "ppo", "dpo", "kto")),
)
def show_data(args: argparse.Namespace) -> None:
    """Show a record, or the batch of a config, as the model sees it: template, tokens, ids, labels, pairs."""
    if (args.file is None) == (args.config is None) or (args.config and not args.stage):
        raise UserError("give either FILE, or --config with --stage")
    from kochat_trl.desk.curation.show import show_batch, show_record
    from kochat_trl.settings.parse import parse_arguments

    if args.config:
        show_batch(args.stage, parse_arguments(args.stage, args.config, []), args.index, console())
        return
    options = opt.data_arguments(args)
    raws = list(islice(read_records(args.file, options), args.index + 1))
    if len(raws) <= args.index:
        raise UserError(f"{args.file}: there is no record {args.index}: it has {len(raws)}, from 0")
    raw = raws[-1]
    records = parse(raw, args.kind or kind_of(raw) or "sft")  # nothing that is known: the error says what is
    for record in records:
        show_record(raw.source, record, options, opt.tokenizer_of(args.tokenizer), console())


@command(
    "data convert",
    "kochat data convert data/kochatgpt/kochatgpt_2_RM.jsonl --to preference --invalid-records skip "
    "--output outputs/pairs.jsonl",
    FILE,
    flag("--to", required=True, choices=(*opt.KINDS, "messages")),
    opt.NEW_JSONL,
    *opt.READING,
    opt.PAIRS,
    flag("--rank-margins", "give each pair the distance of its ranks", action="store_true"),
    flag("--template", TEMPLATED, action=argparse.BooleanOptionalAction, default=True),
    flag("--tokenizer", "whose template to apply; KoChatGPT's unless given", "MODEL"),
    opt.TRUST,
    opt.INVALID_RECORDS,
)
def convert_data(args: argparse.Namespace) -> None:
    """Write a data file in TRL's dataset formats, as JSON lines of text that any other tool can use.

    sft: prompt and completion (`text` for a dialogue of several exchanges; `messages` without template).
    preference: prompt, chosen, rejected, and the group that pairs of one ranking share. prompt: prompt.
    kto: prompt, completion, label; of a ranking the best answer is true, the others are false. messages: SFT's, as
    lists of messages without template. Without template, a record with a system message or several turns is written as
    lists of messages under the same names.
    """
    from kochat_trl.desk.curation.convert import template_tokenizer, text_rows

    refuse_existing(args.output)
    options = opt.data_arguments(args)
    tokenizer = (opt.tokenizer_of(args.tokenizer) or template_tokenizer()) if args.template else None
    invalid: list[RecordError] = []
    records = 0

    def rows() -> Any:
        nonlocal records
        kind: Any = "sft" if args.to == "messages" else args.to
        skip = args.invalid_records == "skip"
        for source, record in read_as(kind, [args.file], invalid, options=options, skip_invalid=skip):
            records += 1
            if args.to == "messages":
                yield {"messages": record.messages}
            else:
                yield from text_rows(record, source.index, options, tokenizer)

    written = write_records(args.output, "lines", rows())
    opt.list_records(invalid)
    print(f"{written} rows from {records} records, written to {args.output}.")


@command(
    "data clean",
    "kochat data clean data/kochatgpt/kochatgpt_3_PPO.jsonl --output outputs/clean_prompts.jsonl",
    FILE,
    flag("--output", "a new file, in the shape of FILE", "OUT", required=True),
    flag("--report", "a new file (default: OUT.report.jsonl)", "REPORT.jsonl"),
    flag("--fix", "apply these fixes only", "NAME", nargs="+"),
    opt.KIND,
    *opt.READING,
    flag("--tokenizer", "for the fixes that look at tokens", "MODEL"),
    opt.TRUST,
    flag("--max-length", "for the fix `overlong`", "N", type=int),
    flag("--against", "drop prompts that are in these files", "FILE", nargs="+", default=[]),
    epilog=f"fixes, all applied unless --fix names some; (*) only if named:\n{FIXES}\n\n",
)
def clean_data(args: argparse.Namespace) -> None:
    """Mend or drop faulty records: writes a new file in the same shape, and a report of every change."""
    from kochat_trl.desk.curation.clean import clean_file
    from kochat_trl.desk.curation.view import print_summary

    report = args.report or f"{args.output}.report.jsonl"
    settings = {"report": report, "fixes": args.fix, "against": args.against} | _auditing(args)
    print_summary(clean_file(args.file, args.output, **settings), console())
    print(f"Written to {args.output}; what was changed or dropped is in {report}.")


@command(
    "data prompts",
    "kochat data prompts data/kochatgpt/kochatgpt_1_SFT.jsonl --output outputs/prompts.jsonl",
    FILE,
    opt.NEW_JSONL,
    *opt.READING,
    opt.INVALID_RECORDS,
)
def make_prompts(args: argparse.Namespace) -> None:
    """Make a file of PPO prompts from the prompts of any data file, such as the SFT file or a seed file."""
    refuse_existing(args.output)
    skip = args.invalid_records == "skip"
    prompts, invalid = read_prompts(args.file, skip, options=opt.reading_options(args))
    write_records(args.output, "array", (prompt.fields for prompt in prompts))
    opt.list_records(invalid)
    print(f"{len(prompts)} prompts, written to {args.output}.")


@command(
    "data rank",
    f"kochat data rank data/kochatgpt/kochatgpt_3_PPO.jsonl --sources outputs/kogpt2/sft {opt.KOGPT2} "
    "--limit 8 --output outputs/rankings.jsonl",
    flag("file", "any data file that has prompts", "PROMPTS"),
    flag("--sources", SOURCES, "SOURCE", nargs="+", required=True),
    flag("--reward-model", "rank by its scores instead of the sources' order", "MODEL"),
    opt.NEW_JSONL,
    flag("--limit", "only the first N records", "N", type=int),
    flag("--max-new-tokens", "of an answer (default: 64)", "N", type=int, default=64),
    flag("--temperature", "0 is greedy (default: 1)", "T", type=float, default=1.0),
    flag("--seed", "of the answers and of the completions' order (default: 0)", type=int, default=0),
    *opt.READING,
    opt.INVALID_RECORDS,
    opt.TRUST,
)
def make_rankings(args: argparse.Namespace) -> None:
    """Make a ranking file from the answers of several models: what KoChatGPT's stage 2 trains on."""
    refuse_existing(args.output)
    if len(args.sources) < 2:
        raise UserError("a ranking takes two --sources or more")
    skip = args.invalid_records == "skip"
    prompts, invalid = read_prompts(args.file, skip, args.limit, opt.reading_options(args))
    settings = (args.max_new_tokens, args.temperature)
    answers = [gather_answers(source, prompts, *settings, args.seed + i) for i, source in enumerate(args.sources)]
    scores = gather_scores(args.reward_model, prompts, answers) if args.reward_model else None
    ranked = rank_answers(prompts, answers, args.seed, scores)
    opt.list_records(invalid)
    _write_ranked(args.output, *ranked)


@command(
    "data sample",
    "kochat data sample outputs/kogpt2/sft data/kochatgpt/kochatgpt_3_PPO.jsonl --n 4 "
    "--reward-model outputs/kogpt2/reward --limit 8 --output outputs/sampled.jsonl",
    opt.POLICY,
    flag("file", "any data file that has prompts", "PROMPTS"),
    flag("--n", "answers to each prompt (default: 8)", "N", type=int, default=8),
    flag("--reward-model", "what ranks them", "MODEL", required=True),
    opt.choice("--to", SAMPLED_TO, "ranking", "sft", "preference"),
    opt.NEW_JSONL,
    flag("--limit", "only the first N records", "N", type=int),
    flag("--decoding", f"{opt.PRESETS}; default: sample", "PRESET", default="sample"),
    *opt.SAMPLING,
    *opt.READING,
    *opt.BATCHES,
    opt.TRUST,
)
def sample_data(args: argparse.Namespace) -> None:
    """Make data of a model's own answers, as a reward model ranks them: for another round of training.

    Of equal answers one is kept. Answers are scored as the file has them, with an end, also where none was sampled.
    """
    from kochat_trl.desk.answers.best_of import kl_of_best, sample_answers
    from kochat_trl.desk.answers.generate import decoding

    refuse_existing(args.output)
    if args.n < 2 and args.to != "sft":
        raise UserError(f"--n {args.n}: two answers or more can be ranked")
    settings = decoding(args.decoding, **opt.fields_of(args))
    prompts, invalid = read_prompts(args.file, args.invalid_records == "skip", args.limit, opt.reading_options(args))
    found = sample_answers(*opt.policy_of(args), prompts, settings, args.n, args.batch_size, args.seed)
    answers = [[its[i].text for its in found] for i in range(args.n)]
    scores = gather_scores(args.reward_model, prompts, answers)
    ranked = rank_answers(prompts, answers, args.seed, scores, args.to)
    opt.list_records(invalid)
    _write_ranked(args.output, *ranked, args.to)
    mean, best = fmean(chain(*scores)), fmean(map(max, zip(*scores, strict=True)))
    print(
        f"Mean score of all answers {mean:.2f}, of the best of {args.n} {best:.2f}, whose KL from what is sampled is "
        f"at most {kl_of_best(args.n):.2f} nats, log n − (n−1)/n."
    )


def _write_ranked(output: str, records: list[dict[str, Any]], left_out: list[str], to: str = "ranking") -> None:
    reason = "every answer to it is empty" if to == "sft" else "no answer to it is better than another"
    for prompt in left_out:
        print(f"left out, as {reason}: {prompt!r}")
    if not records:
        raise UserError(f"no prompt is left: {reason}")
    write_records(output, "array", records)
    without = f" Prompts left out: {len(left_out)}." if left_out else ""
    print(f"{len(records)} records, written to {output}.{without}")


@command(
    "data split",
    "kochat data split data/kochatgpt/kochatgpt_2_RM.jsonl --train outputs/rm_train.jsonl "
    "--held-out outputs/rm_held_out.jsonl",
    FILE,
    flag("--train", "a new file", "OUT", required=True),
    flag("--held-out", "a new file", "OUT", required=True),
    flag("--fraction", "of the records to hold out (default: 0.1)", type=float, default=0.1),
    *opt.READING,
    opt.SEED,
)
def split_data(args: argparse.Namespace) -> None:
    """Split a data file in two by a seed; records with the same prompt stay together."""
    train, held_out = split_file(
        args.file, args.train, args.held_out, args.fraction, args.seed, opt.reading_options(args)
    )
    print(f"{train} records, written to {args.train}; {held_out}, written to {args.held_out}.")


def _auditing(args: argparse.Namespace) -> dict[str, Any]:
    found = {"kind": args.kind, "options": opt.reading_options(args), "max_length": args.max_length}
    return found | {"tokenizer": opt.tokenizer_of(args.tokenizer)}

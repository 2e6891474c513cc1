"""`kochat label`: people rank answers."""

import argparse
import shlex

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing


@command(
    "label",
    "kochat label data/kochatgpt/kochatgpt_2_RM.jsonl --as minji --to outputs/labels.jsonl --overlap 0.2",
    flag("files", "rankings, pairs, several answers to each prompt; or prompts, with --answers", "FILE", nargs="*"),
    flag("--to", "the file of judgements, which is only ever appended to", "JOURNAL", required=True),
    flag("--as", "who judges", "NAME", dest="annotator"),
    flag("--answers", "two files or more with an answer to each prompt", "FILE", nargs="+", default=[]),
    opt.choice("--order", "of the items: the file's (default), or drawn by --seed", "in-order", "random"),
    opt.SEED,
    flag("--overlap", "the share of items that two people judge (default: 0)", "SHARE", type=float, default=0.0),
    flag("--lang", "of what is shown (default: that of the locale)", choices=("ko", "en")),
    opt.one_of(
        flag("--export", "write what was judged as rankings there, a new file", "OUT.jsonl"),
        flag("--agreement", "say how far people agree", action="store_true"),
    ),
    flag("--reward-model", "with --agreement, how far it agrees with each of them", "MODEL"),
    *opt.READING,
    opt.INVALID_RECORDS,
    opt.TRUST,
)
def label_answers(args: argparse.Namespace) -> None:
    """Rank answers, blind and in a drawn order; each judgement is on disk before the next item is shown.

    The same command goes on where it stopped. --export writes the rankings, a record a judgement, for `kochat data
    check` and the recipes; --agreement compares people who judged the same items, and lists what they disagree on.
    """
    if args.export or args.agreement:
        if args.files or args.annotator or (args.reward_model and args.export):
            raise UserError(
                "--export and --agreement read JOURNAL; give them no FILE, no --as (--reward-model is for --agreement)"
            )
        (_export if args.export else _agreement)(args)
        return
    if not args.files or not args.annotator or args.reward_model:
        raise UserError("give FILE… and --as NAME to judge, or --export OUT.jsonl, or --agreement")
    if len(args.answers) == 1:
        raise UserError("--answers takes two files or more; what is in one file can be judged without it")
    from kochat_trl.desk.labels.items import read_items
    from kochat_trl.desk.labels.journal import Journal, is_name
    from kochat_trl.desk.labels.queue import Queue
    from kochat_trl.desk.labels.terminal import label, language

    if not is_name(args.annotator):
        raise UserError(f"--as: found {args.annotator!r}, expected a name of visible characters")
    skip = args.invalid_records == "skip"
    items, invalid, few = read_items(args.files, args.answers, options=opt.reading_options(args), skip_invalid=skip)
    opt.list_records(invalid)
    for prompt in few:
        print(f"left out, as it has no two different answers: {prompt!r}")
    queue = Queue(items, args.order, args.seed, args.overlap)
    with Journal(args.to) as journal:
        label(journal, queue, args.annotator, args.seed, args.lang or language(), console())
    print(f"kochat label --export rankings.jsonl --to {shlex.quote(args.to)}")


def _export(args: argparse.Namespace) -> None:
    from kochat_trl.desk.labels.export import ranking_records
    from kochat_trl.desk.labels.journal import read_journal
    from kochat_trl.desk.writers import write_records

    refuse_existing(args.export)
    records, without = ranking_records(read_journal(args.to).standing)
    told = f"all bad {without['all_bad']}, skipped {without['skip']}, all tied {without['tied']}"
    if not records:
        raise UserError(f"{args.to}: no judgement prefers an answer ({told})")
    write_records(args.export, "array", records)
    print(f"{len(records)} rankings, written to {args.export}. Without one: {told}.")


def _agreement(args: argparse.Namespace) -> None:
    from kochat_trl.desk.labels.agreement import agreement
    from kochat_trl.desk.labels.items import score_items
    from kochat_trl.desk.labels.journal import read_journal
    from kochat_trl.desk.labels.terminal import print_agreement

    judgements = read_journal(args.to).standing
    items = {it.item.id: it.item for it in judgements if it.tiers is not None}
    if not items:
        raise UserError(f"{args.to}: no judgement ranks answers")
    scores = score_items(args.reward_model, list(items.values())) if args.reward_model else None
    print_agreement(agreement(judgements, scores), console())

"""`kochat label` and `kochat app`: people rank answers, in a terminal or on a page that also talks and watches."""

import argparse
import shlex
from contextlib import ExitStack, closing
from typing import Any

from kochat_trl.cli import options as opt
from kochat_trl.cli.options import command, console, flag
from kochat_trl.errors import UserError
from kochat_trl.files import refuse_existing

FILES = flag("files", "rankings, pairs, several answers to each prompt; or prompts, with --answers", "FILE", nargs="*")
JOURNAL = "the file of judgements, which is only ever appended to"
ORDER = "of the items: the file's (default), drawn by --seed, or first where --reward-model is least sure"
QUEUE = (
    flag("--answers", "two or more: files with an answer to each prompt, models that sample", "SOURCE", nargs="+"),
    flag("--decoding", f"of models in --answers: {opt.PRESETS}; default: sample", "PRESET", default="sample"),
    opt.choice("--order", ORDER, "in-order", "random", "uncertain"),
    flag("--overlap", "the share of items that two people judge (default: 0)", "SHARE", type=float, default=0.0),
    *opt.SAMPLING,
    *opt.READING,
    opt.INVALID_RECORDS,
    opt.TRUST,
)


@command(
    "label",
    "kochat label data/kochatgpt/kochatgpt_2_RM.jsonl --as minji --to outputs/labels.jsonl --overlap 0.2",
    FILES,
    flag("--to", JOURNAL, "JOURNAL", required=True),
    flag("--as", "who judges", "NAME", dest="annotator"),
    flag("--lang", "of what is shown (default: that of the locale)", choices=("ko", "en")),
    opt.one_of(
        flag("--export", "write what was judged as rankings there, a new file", "OUT.jsonl"),
        flag("--agreement", "say how far people agree", action="store_true"),
    ),
    flag("--reward-model", "for --order uncertain; with --agreement, it is compared with each of them", "MODEL"),
    *QUEUE,
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
    if not args.files or not args.annotator or (args.reward_model and args.order != "uncertain"):
        raise UserError("give FILE… and --as NAME to judge, or --export OUT.jsonl, or --agreement")
    from kochat_trl.desk.answers.held import HeldModels
    from kochat_trl.desk.labels.journal import Journal, is_name
    from kochat_trl.desk.labels.terminal import label, language

    if not is_name(args.annotator):
        raise UserError(f"--as: found {args.annotator!r}, expected a name of visible characters")
    labelling_in = _labelling(args, HeldModels())
    with Journal(args.to) as journal, closing(labelling_in(journal)) as labelling:
        label(labelling, args.annotator, args.lang or language(), console())
    print(f"kochat label --export rankings.jsonl --to {shlex.quote(args.to)}")


@command(
    "app",
    "kochat app data/kochatgpt/kochatgpt_2_RM.jsonl --to outputs/app_labels.jsonl "
    "--models outputs/kogpt2/sft outputs/kogpt2/ppo --reward-model outputs/kogpt2/reward",
    FILES,
    flag("--to", JOURNAL, "JOURNAL"),
    flag("--models", "those to talk with; default: those among --answers", "MODEL", nargs="+"),
    flag("--reward-model", "scores answers in Talk and Agreement; for --order uncertain", "MODEL"),
    flag("--outputs", "the folder whose runs are watched (default: outputs)", "FOLDER", default="outputs"),
    flag("--port", "default: 7860; 0 is a free one", type=int, default=7860),
    opt.LOADING,
    *QUEUE,
)
def serve_page(args: argparse.Namespace) -> None:
    """Open a page on this machine: rank answers, talk with models side by side, watch runs.

    Give FILE… and --to to rank, --models to talk; what is preferred in Talk goes to --to as well. Only this machine
    can open the page: http://127.0.0.1:7860, or through `ssh -L 7860:127.0.0.1:7860`. Ctrl-C ends it.
    """
    try:
        from kochat_trl.desk.app.server import make_app, serve
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}: pip install 'kochat_trl[app]'") from None
    from pathlib import Path

    from kochat_trl.desk.answers.held import HeldModels
    from kochat_trl.desk.labels.candidates import is_file
    from kochat_trl.desk.labels.journal import Journal
    from kochat_trl.desk.labels.labelling import Labelling
    from kochat_trl.desk.labels.queue import Queue

    if args.files and not args.to:
        raise UserError("--to JOURNAL is missing: where judgements go, such as --to outputs/labels.jsonl")
    models = HeldModels(args.loading)
    labelling_in = _labelling(args, models) if args.files else lambda journal: Labelling(journal, Queue([]))
    talk = args.models or [source for source in args.answers or [] if not is_file(source)]
    with ExitStack() as until:
        labelling = None
        if args.to:
            labelling = until.enter_context(closing(labelling_in(until.enter_context(Journal(args.to)))))
        given = (labelling, models, talk, args.reward_model, Path(args.outputs))
        serve(lambda port: make_app(*given, port), args.port)
    if args.to:
        print(f"kochat label --export rankings.jsonl --to {shlex.quote(args.to)}")


def _labelling(args: argparse.Namespace, models: Any) -> Any:
    """What `Labelling` takes to a journal, once all that may be wrong in the files has been told."""
    from kochat_trl.desk.answers.generate import decoding
    from kochat_trl.desk.curation.build import read_prompts
    from kochat_trl.desk.labels.candidates import answers_to, is_file, judged_before
    from kochat_trl.desk.labels.items import read_items, score_items
    from kochat_trl.desk.labels.labelling import Labelling
    from kochat_trl.desk.labels.queue import Queue, drawn

    sources = args.answers or []
    if len(sources) == 1:
        raise UserError("--answers takes two or more; of one model, name it twice; one file can be judged without it")
    if args.order == "uncertain" and not args.reward_model:
        raise UserError("--order uncertain needs the --reward-model that is to be sure")
    skip, options = args.invalid_records == "skip", opt.reading_options(args)
    if all(map(is_file, sources)):
        items, invalid, few = read_items(args.files, sources, options=options, skip_invalid=skip)
        opt.list_records(invalid)
        for prompt in few:
            print(f"left out, as it has no two different answers: {prompt!r}")
        scores = score_items(args.reward_model, items) if args.order == "uncertain" else None
        queue = Queue(items, args.order, args.seed, args.overlap, scores)
        return lambda journal: Labelling(journal, queue, args.seed)
    if args.order == "uncertain":
        raise UserError("--order uncertain takes answers that are there; make them with `kochat data sample` first")
    settings = decoding(args.decoding, **opt.fields_of(args))
    read = [read_prompts(file, skip, options=options) for file in args.files]
    opt.list_records(error for _, invalid in read for error in invalid)
    prompts = list(dict.fromkeys(prompt for found, _ in read for prompt in found))
    if args.order == "random":
        prompts.sort(key=lambda prompt: drawn(f"{args.seed}/{prompt}"))
    find = answers_to(prompts, sources, models, settings, args.seed)

    def labelling_in(journal: Any) -> Any:
        before = judged_before(journal.state, prompts)
        labelling = Labelling(journal, Queue(list(before.values()), args.order, args.seed, args.overlap), args.seed)
        labelling.make_items([prompt for prompt in prompts if prompt not in before], find)
        return labelling

    return labelling_in


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

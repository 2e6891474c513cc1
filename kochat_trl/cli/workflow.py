"""`kochat doctor`, `run`, `report` and `memory`: the machine, all stages at once, and what they did or would take."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from kochat_trl.cli.options import KOGPT2, TRUST, command, console, flag
from kochat_trl.errors import UserError

METHODS = flag(
    "--methods", "what trains the policy (default: ppo)", nargs="+", choices=("ppo", "dpo", "kto"), default=["ppo"]
)


@command(
    "doctor",
    "kochat doctor --tokenizer outputs/kogpt2/sft",
    flag("--tokenizer", "a folder with kogpt2's (default: the Hub's cache)", "FOLDER", default=KOGPT2),
    flag("--json", "the same as JSON, to paste into a report of a bug", action="store_true"),
)
def examine_machine(args: argparse.Namespace) -> None:
    """Say what this machine has for a run, before you start; exits with 1 if there is a problem.

    Python, packages, GPU, int8 and nf4 (tried on one layer), kogpt2's tokenizer, memory, disk, Hub: a line each, and
    what to do where it isn't ok. Nothing is downloaded. No name or path of yours is printed.
    """
    from kochat_trl.desk.workflow.doctor import examine, print_findings

    findings = examine(args.tokenizer)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print_findings(findings, console())
    if any(finding.mark == "problem" for finding in findings):
        sys.exit(1)


@command(
    "run",
    "kochat run configs/kogpt2 --dry-run",
    flag("configs", "a folder with a config for each stage, or an experiment", "CONFIG", nargs="+"),
    flag("--from", "run this stage and those after it again", "STAGE", dest="first"),
    flag("--dry-run", "print the plan, and run nothing", action="store_true"),
    flag("--seeds", "run each config with each, in a folder for each", "N", type=int, nargs="+", default=[]),
    METHODS,
    flag("--accelerate", "launcher config (default: configs/accelerate/one_gpu.yaml, or cpu.yaml)", "YAML"),
)
def run_pipeline(args: argparse.Namespace) -> None:
    """Run SFT, reward model, PPO, merge and report, one after the other; the same command goes on where it stopped.

    A config is a folder with sft.yaml, reward.yaml and ppo.yaml, or an experiment: a file that extends such a folder.
    With --methods dpo the folder's dpo.yaml takes the place of PPO; the reward model then scores answers in the report.
    A finished stage is kept, one that broke off goes on from its last checkpoint, and what depends on a stage that
    runs runs again. An output that is in the way is renamed. Several configs, methods or seeds end with a table.
    """
    from kochat_trl.desk.workflow import pipeline as pipe

    many = len(args.configs) > 1 or len(args.methods) > 1 or bool(args.seeds)
    if not many:
        plans = [pipe.make_plan(args.configs[0], args.first, launcher=args.accelerate, method=args.methods[0])]
    elif args.first:
        raise UserError("--from is for one config and one method, without --seeds")
    else:
        plans = pipe.make_plans(args.configs, args.seeds, args.accelerate, args.methods)
    steps = [step for plan in plans for step in plan.steps]
    pipe.print_plan(steps, console())
    if args.dry_run:
        return
    pipe.run_plan(steps, console())
    if many:
        pipe.print_runs(pipe.compare_runs(plans), console())
        return
    outputs, method = plans[0].outputs, plans[0].method
    print(f"What {method.upper()} changed: {outputs['report']}/report.html")
    print(f"Talk with the model: kochat chat {outputs.get('merge', outputs[method])}")


@command(
    "report",
    "kochat report outputs/kogpt2/ppo --limit 8",
    flag("runs", "the output folder of PPO, DPO or KTO, or several from one SFT model", "RUN", nargs="+"),
    flag("--prompts", "any file of prompts (default: SFT's eval_files, or else PPO's)", "FILE"),
    flag("--limit", "prompts to ask (default: 200)", "N", type=int, default=200),
    flag("--reward-model", "what scores the answers of a run without one, such as DPO's", "DIR"),
    flag("--max-new-tokens", "longest answer (default: the first run's response_length)", "N", type=int),
    flag("--output", "for report.html and report.json (of one run: RUN/report)", "DIR"),
    flag("--seed", "of the answers (default: 0)", type=int, default=0),
    TRUST,
)
def make_report(args: argparse.Namespace) -> None:
    """Show what a run changed: base, SFT and PPO, DPO or KTO side by side, in one page that needs no network.

    The page has every model's answers to held-out prompts with the reward model's score, win rates, KL, likeness to
    references and the loss on them, curves of all stages, and what to worry about; on sample data also what share of
    the answers is right, and polite. report.json has the same as numbers.
    """
    from kochat_trl.desk.workflow.page import write_report
    from kochat_trl.desk.workflow.report import build_report

    if len(args.runs) > 1 and not args.output:
        raise UserError("say with --output where the page of several runs goes")
    asked = (args.prompts, args.limit, args.seed, args.reward_model, args.max_new_tokens)
    report = build_report(args.runs, *asked)
    page = write_report(report, args.output or Path(args.runs[0]) / "report")
    for worry in report["worries"]:
        run = f"{worry['run']}: " if len(report["runs"]) > 1 else ""
        print(f"! {run}{worry['sign']}\n  {worry['advice']}")
    print(f"Written to {page}, and report.json beside it.")


@command(
    "memory",
    "kochat memory configs/kogpt2 --gpu-gb 8",
    flag("config", "a folder with a config for each stage, or an experiment", "CONFIG"),
    METHODS,
    flag("--gpu-gb", "sizes of GPUs to fit (default: 6 8 12 16 24)", "N", type=float, nargs="+"),
    flag("--processes", "GPUs that the base is divided among (shard_base)", "N", type=int, default=1),
)
def show_memory(args: argparse.Namespace) -> None:
    """Say how much memory SFT, reward model and PPO or --methods take, and what fits a GPU, before anything is loaded.

    Of the base model only config.json is read. Texts are as long as the config allows, so a real run takes less. The
    figures are what the tensors take; a GPU needs about 1 GB more, which the second table leaves for it.
    """
    from kochat_trl.desk.workflow.memory import CARDS, print_memory

    print_memory(args.config, args.gpu_gb or CARDS, console(), args.methods, args.processes)

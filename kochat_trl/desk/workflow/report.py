"""What a run changed, in figures: base, SFT and what PPO, DPO or KTO made of it, side by side."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from kochat_trl.data.parse import parse
from kochat_trl.data.probes import PROBES
from kochat_trl.data.readers import read_records
from kochat_trl.data.records import Dialogue, Prompt, RecordError
from kochat_trl.data.text import hangul_share
from kochat_trl.desk.answers.generate import Response, decoding, generate_answers, mean_logprob
from kochat_trl.desk.answers.likeness import bleu, chrf, distinct, rouge_l
from kochat_trl.desk.evaluation.metrics import accuracy_of
from kochat_trl.desk.sample.sample import Judge, judge_of
from kochat_trl.desk.statistics import mean_interval, wilson_interval
from kochat_trl.desk.workflow.page import MADE_BY
from kochat_trl.desk.workflow.worries import worries
from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_config, load_policy, positions_of
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.ppo.rewards import RewardFunctions
from kochat_trl.reward.score import load_scorer, score_ids
from kochat_trl.rows.encode import encode_prompts, encode_turns
from kochat_trl.settings.keys import ModelArguments

import yaml
from tqdm.auto import tqdm

LIMIT = 200  # prompts; chrF and the intervals hardly change beyond


@dataclass(frozen=True)
class Run:
    """The folders of a run's stages, as their `resolved.yaml` name them; `settings` are those of `output`.

    `method` made `output` of `sft`: ppo, dpo or kto.
    """

    base: str
    revision: str
    sft: Path
    reward: Path | None
    output: Path
    method: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, output: str | Path, reward_model: str | None = None) -> "Run":
        """The run that ended in the folder `output`; `reward_model` scores it unless it trained against one.

        Raises `UserError` if that isn't an output of PPO, DPO or KTO, or a stage is gone.
        """
        settings = _resolved(Path(output))
        if "sft_model_path" not in settings:
            raise UserError(
                f"{output}: not the output of recipes/ppo.py, dpo.py or kto.py; give that folder, such as "
                "outputs/kogpt2/ppo"
            )
        method = next(name for name, key in MADE_BY.items() if key in settings)
        scorer = settings.get("reward_model_path") or reward_model
        if scorer is None and not settings.get("reward_functions"):
            raise UserError(
                f"{output}: was trained without a reward model; say with --reward-model what scores answers"
            )
        settings["reward_model_path"] = scorer
        sft, reward = Path(settings["sft_model_path"]), Path(scorer) if scorer else None
        if reward:
            _resolved(reward)
        started = _resolved(sft)
        base, revision = started["model_name_or_path"], started.get("model_revision", "main")
        return cls(base, revision, sft, reward, Path(output), method, settings)

    @property
    def reward_functions(self) -> RewardFunctions:
        """What PPO's settings name beside the reward model; older ones lack the keys."""
        keys = dict.fromkeys(("reward_functions", "reward_weights", "target_length"))
        return RewardFunctions(SimpleNamespace(**keys | self.settings))


def named_runs(folders: Sequence[str | Path], reward_model: str | None = None) -> dict[str, Run]:
    """The runs of output folders by name: its method, such as `ppo`, or of several what tells their folders apart.

    Raises `UserError` if they don't start from the same SFT model, which is what they are compared with.
    """
    runs = [Run.of(folder, reward_model) for folder in folders]
    for i, run in enumerate(runs[1:], start=1):
        if run.output.resolve() in [earlier.output.resolve() for earlier in runs[:i]]:
            raise UserError(f"{run.output} is named twice")
        if run.sft.resolve() != runs[0].sft.resolve():
            raise UserError(
                f"{run.output} starts from {run.sft}, and {runs[0].output} from {runs[0].sft}: a page compares runs "
                "that start from the same SFT model. `kochat run` with several configs compares others in a table"
            )
    if len(runs) == 1:
        return {runs[0].method: runs[0]}
    common = os.path.commonpath([run.output.resolve() for run in runs])
    names = [run.output.resolve().relative_to(common).parts for run in runs]
    while len({parts[-1] for parts in names}) == 1 and min(map(len, names)) > 1:
        names = [parts[:-1] for parts in names]
    own = ["/".join(parts) for parts in names]
    return {f"{name}/ppo" if name in ("base", "sft") else name: run for name, run in zip(own, runs, strict=True)}


def _resolved(folder: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no resolved.yaml there, so it is no stage's output") from None


def read_questions(
    runs: Sequence[Run], file: str | None, limit: int = LIMIT
) -> tuple[list[Prompt], dict[Prompt, str], bool, Judge | None]:
    """The prompts to ask, after the course's four; references to those that have one; whether they are held out; and
    the judge of sample data, if that is what they are.

    They come from `file`, any data file that has prompts, or from SFT's or PPO's `eval_files`, or else from the prompts
    that PPO trained on. Records that can't be read are left out.
    """
    sft, ppo = _resolved(runs[0].sft), [run.settings for run in runs]
    sources = [file] if file else sft["eval_files"] or ppo[0]["eval_files"] or ppo[0]["train_files"]
    trained = {str(Path(path).resolve()) for settings in (sft, *ppo) for path in settings.get("train_files", [])}
    held_out = not any(str(Path(source).resolve()) in trained for source in sources)
    prompts = [Prompt(text) for text, _ in PROBES]
    references: dict[Prompt, str] = {}
    for raw in chain.from_iterable(map(read_records, sources)):
        if len(prompts) >= limit + len(PROBES):
            break
        with suppress(RecordError):
            new: list[Any] = [prompt for prompt in parse(raw, "prompt") if prompt not in prompts]
            prompts += new
            dialogues: list[Any] = parse(raw, "sft") if new else []  # a record may be no more than a prompt
            for dialogue in dialogues:
                asked = Prompt(dialogue.texts[-2], dialogue.system, dialogue.texts[:-2])
                if asked in new:
                    references.setdefault(asked, dialogue.texts[-1])
    return prompts, references, held_out, judge_of(sources[0]) if len(sources) == 1 else None


def build_report(
    folders: Sequence[str | Path],
    file: str | None = None,
    limit: int = LIMIT,
    seed: int = 0,
    reward_model: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """All that the page shows, as JSON: `answers`, `metrics`, `wins`, `kl`, `curves`, `worries`, and the `runs`.

    `folders` are the outputs of one run, or of several that start from one SFT model. Each model answers every prompt
    by sampling as the first run does (the whole distribution, its temperature and length, or `max_new_tokens`), and the
    first run's reward model, or `reward_model` if it has none, or else its reward functions, score all. Each also has
    its `loss` on the references. The course's four questions are shown, and count in no figure; prompts that leave no
    room for an answer are left out. Raises `UserError` if a folder isn't such an output, or if there are not two
    prompts.
    """
    runs = named_runs(folders, reward_model)
    first = next(iter(runs.values()))
    prompts, references, held_out, judge = read_questions(list(runs.values()), file, limit)
    tokenizer = load_tokenizer(str(first.output))
    settings = decoding("sample")
    length = max_new_tokens or first.settings.get("response_length", settings["max_new_tokens"])
    temperature = first.settings.get("temperature", settings["temperature"])
    positions = positions_of(load_config(first.base, first.revision))
    all_ids = encode_prompts(tokenizer, [prompt.messages for prompt in prompts])
    fits = [positions is None or len(ids) + length <= positions for ids in all_ids]
    prompts, prompt_ids = list(compress(prompts, fits)), list(compress(all_ids, fits))
    settings |= {"max_new_tokens": length, "temperature": temperature}
    asked = [i for i, prompt in enumerate(prompts) if prompt.prompt not in dict(PROBES)]
    if len(asked) < 2:
        raise UserError(f"{len(asked)} prompts to ask; give a file of more with --prompts")

    paths = {name: str(run.output) for name, run in runs.items()} | {"sft": str(first.sft), "base": first.base}
    told_of = {name: [name] for name in runs} | {"sft": [*runs], "base": []}  # whose answers each is to say log p of
    answers: dict[str, list[Response]] = {}
    logprobs: dict[tuple[str, str], list[float]] = {}  # in nats, of each answer
    known = _references(tokenizer, [prompts[i] for i in asked], references, positions)
    losses: dict[str, dict[str, float]] = {}
    for name, path in paths.items():
        model = load_policy(path, ModelArguments(dtype="float32", model_revision=first.revision), tokenizer)
        answers[name] = generate_answers(model, tokenizer, prompts, settings, seed=seed)
        for run in told_of[name]:
            logprobs[name, run] = _logprobs(model, list(zip(prompt_ids, answers[run], strict=True)), temperature)
        losses[name] = _loss(model, known)
        del model
    scorer = load_scorer(str(first.reward), "float32", tokenizer) if first.reward else None
    functions = first.reward_functions
    prompt_texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompt_ids]
    models = ["base", "sft", *runs]
    rows: list[dict[str, Any]] = [prompt.fields | {"reference": references.get(prompt)} for prompt in prompts]
    for name in models:
        texts = [[*ids, *answer.ids] for ids, answer in zip(prompt_ids, answers[name], strict=True)]
        own = answers[name]
        rewards = functions(prompt_texts, [a.text for a in own], [[*a.ids] for a in own], [a.ended for a in own])
        alone = [{of: its[i] for of, its in rewards.items()} for i in range(len(rows))]
        scores = score_ids(scorer, tokenizer, texts) if scorer else [functions.total(each) for each in alone]
        for row, answer, score, its in zip(rows, answers[name], scores, alone, strict=True):
            row[name] = {"text": answer.text, "ended": answer.ended, "tokens": len(answer.ids), "score": score}
            row[name] |= {"rewards": its} if its else {}
    counted = [rows[i] for i in asked]
    if judge is not None and all(judge.knows(row["prompt"]) for row in counted):
        for row in counted:
            for name in models:
                said = row["prompt"], row[name]["text"], row[name]["ended"]
                verdict = judge.verdict(*said)
                row[name] |= {"judge": judge.score(*said), "right": verdict["correct"], "polite": verdict["polite"]}
    drift = {name: [logprobs[name, name][i] - logprobs["sft", name][i] for i in asked] for name in runs}
    versus = [("sft", "base"), *((name, "sft") for name in runs)]
    report: dict[str, Any] = {
        "runs": {name: str(run.output) for name, run in runs.items()},
        "methods": {name: run.method for name, run in runs.items()},
        "base": first.base,
        "reward": str(first.reward or ", ".join(functions.names)),
        "seed": seed,
        "held_out": held_out,
        "prompts": len(asked),
        "metrics": {n: _metrics(counted, n, [answers[n][i].ids for i in asked]) | losses[n] for n in models},
        "wins": {f"{one} over {other}": _wins(counted, one, other) for one, other in versus},
        "kl": {name: _interval(gaps, "mean", "low", "high") for name, gaps in drift.items()},
        "answers": rows,
        "curves": {"sft": _history(first.sft), "reward": _history(first.reward) if first.reward else []}
        | {name: _history(run.output) for name, run in runs.items()},
    }
    report["worries"] = [worry for name, run in runs.items() for worry in worries(report, name, run.settings)]
    return report


def _references(
    tokenizer: Any, prompts: Sequence[Prompt], references: dict[Prompt, str], positions: int | None
) -> list[tuple[list[int], Response]]:
    """The ids of each prompt that has a reference, and of that; without those that run over the model's positions."""
    dialogues = [Dialogue((*p.history, p.prompt, references[p]), p.system).messages for p in prompts if p in references]
    pairs = [(ids, Response("", tuple(answer), True)) for ids, answer in encode_turns(tokenizer, dialogues)]
    return [(ids, answer) for ids, answer in pairs if positions is None or len(ids) + len(answer.ids) <= positions]


def _logprobs(model: Any, pairs: Sequence[tuple[list[int], Response]], temperature: float) -> list[float]:
    """log p of each answer, in nats."""
    shown = tqdm(pairs, desc="log p of answers", delay=2, leave=False)
    return [len(answer.ids) * mean_logprob(model, ids, answer, temperature) for ids, answer in shown]


def _loss(model: Any, known: Sequence[tuple[list[int], Response]]) -> dict[str, float]:
    """The cross-entropy of the references, in nats a token, over all their tokens alike; nothing if there are none.

    SFT's `eval_loss` is the same but for weights: it takes the mean of each batch, and weights that by its records.
    """
    tokens = sum(len(answer.ids) for _, answer in known)
    return {"loss": -sum(_logprobs(model, known, 1.0)) / tokens, "loss_tokens": tokens} if known else {}


def _interval(values: Sequence[float], *names: str) -> dict[str, float]:
    return dict(zip(names, mean_interval(values), strict=True))


def _metrics(rows: Sequence[dict[str, Any]], name: str, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Means over all answers of one model; the likeness to references over those that have one."""
    answers = [row[name] for row in rows]
    found: dict[str, Any] = _interval([answer["score"] for answer in answers], "score", "score_low", "score_high") | {
        "tokens": fmean(answer["tokens"] for answer in answers),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "ended": fmean(answer["ended"] for answer in answers),
        "hangul": fmean(hangul_share(answer["text"]) for answer in answers),
    }
    if alone := answers[0].get("rewards"):
        found["rewards"] = {of: fmean(answer["rewards"][of] for answer in answers) for of in alone}
    pairs = [(row[name]["text"], row["reference"]) for row in rows if row["reference"] is not None]
    if pairs:
        texts, references = zip(*pairs, strict=True)
        found |= {"chrf": chrf(texts, references), "bleu": bleu(texts, references)}
        found |= {"rouge_l": rouge_l(texts, references), "references": len(pairs)}
    if "judge" in answers[0]:
        found |= _interval([answer["judge"] for answer in answers], "judge", "judge_low", "judge_high")
        right = sum(answer["right"] for answer in answers)
        low, high = wilson_interval(right, len(answers))
        found |= {"right": right / len(answers), "right_low": low, "right_high": high}
        found["polite"] = fmean(answer["polite"] for answer in answers)
    return found


def _wins(rows: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, float]:
    """How often the reward model prefers the answer of `one`; a draw counts half. 95 % interval (Wilson).

    `gain` is by how much on the mean, prompt by prompt, with its interval.
    """
    gaps = [row[one]["score"] - row[other]["score"] for row in rows]
    accuracy = accuracy_of([0.5 if gap == 0 else float(gap > 0) for gap in gaps], [row["prompt"] for row in rows])
    low, high = accuracy["interval"]
    share = {"share": accuracy["accuracy"], "low": low, "high": high, "n": len(rows)}
    return share | _interval(gaps, "gain", "gain_low", "gain_high")


def _history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]

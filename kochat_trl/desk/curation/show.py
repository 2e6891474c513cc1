"""A record, or a batch of a config, as the model sees it: template, tokens, ids, labels, pairs."""

from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from kochat_trl.data.rankings import disputed
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking, Record, Source
from kochat_trl.desk.curation.convert import template_tokenizer
from kochat_trl.errors import UserError
from kochat_trl.models.remote import allow_remote_code
from kochat_trl.models.template import render
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.trainer import NO_RANK, RankingCollator
from kochat_trl.rows.encode import IGNORED, encode_dialogue, encode_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import ON_SFT, DataArguments, Stage
from kochat_trl.settings.parse import Arguments

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

UNSEEN = "not trained on, label −100"
TRAINED = "trained on, label = id"
COLLATORS: dict[Stage, Any] = {"sft": DataCollatorForLanguageModeling, "reward": RankingCollator}
COLLATORS |= {"dpo": DataCollatorForPreference, "kto": DataCollatorForUnpairedPreference}
WHOLE = "tokens and ids"  # of a sequence without labels


def show_record(
    source: Source, record: Record, options: DataArguments, tokenizer: PreTrainedTokenizerBase | None, console: Console
) -> None:
    """Print one record: the text of its template, its tokens and labels, and the pairs of a ranking.

    Without a tokenizer the template is KoChatGPT's, and there are no tokens.
    """
    template = tokenizer or template_tokenizer()
    console.rule(Text(str(source)))
    if isinstance(record, Prompt):
        _print_text("templated text", render(template, record.messages, prompt=True), console)
        if tokenizer:
            _print_ids(tokenizer, encode_prompt(tokenizer, record.messages), None, console)
    elif isinstance(record, Dialogue | Labelled):
        if isinstance(record, Labelled):
            console.print(f"label: {str(record.label).lower()}")
        _print_text("templated text", render(template, record.messages), console)
        if tokenizer:
            ids, labels = encode_dialogue(tokenizer, record.messages)
            _print_ids(tokenizer, ids, _parts(labels), console)
    else:
        _print_ranking(record, options, console)
        for i in range(len(record.completions)):
            _print_text(f"completion {i}, templated text", render(template, record.messages(i)), console)
            if tokenizer:
                _print_ids(tokenizer, encode_dialogue(tokenizer, record.messages(i))[0], None, console)


def show_batch(stage: Stage, args: Arguments, index: int, console: Console) -> None:
    """Print the batch that begins with row `index` of a config's training data, padded as its trainer pads it.

    Rows are in the order of the files; a trainer shuffles them.
    """
    path: Any = args.training.sft_model_path if stage in ON_SFT else args.model.model_name_or_path
    if args.training.trust_remote_code:
        allow_remote_code("trust_remote_code: true")
    tokenizer = load_tokenizer(path, args.model.model_revision)
    dataset, report = build_dataset(args.recipe.train_files, stage, tokenizer, args.max_length, args.recipe)
    if not 0 <= index < len(dataset):
        raise UserError(f"there is no row {index}: the training files give rows 0 to {len(dataset) - 1}")
    size = min(args.training.per_device_train_batch_size, len(dataset) - index)
    batch = collator(stage, tokenizer, args.training)([dataset[i] for i in range(index, index + size)])

    console.rule(f"rows {index} to {index + size - 1} of {len(dataset)}, as the {stage} trainer gets them")
    console.print(f"{len(report.left_out)} records were left out, {len(report.in_part)} kept in part.")
    if stage == "ppo":
        console.print("These are prompts alone: in training each is followed by the response that is sampled for it.")
    tensors = Table("tensor", "shape", "type", title="the collated batch", title_justify="left")
    for name, tensor in batch.items():
        tensors.add_row(name, str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."))
    console.print(tensors)
    rows = Table("row", "tokens", "padding", "trained on", title="its sequences", title_justify="left")
    names = [str(row) for row in range(index, index + size)]
    if stage == "dpo":
        names = [f"{name}, {which}" for which in ("chosen", "rejected") for name in names]
    if stage == "reward":
        ranks = zip(names, batch["ranks"].tolist(), strict=True)
        names = [f"{name}, rank {rank}" for name, its_ranks in ranks for rank in its_ranks if rank != NO_RANK]
    if "completion_mask" in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    labels = batch["labels"].tolist() if "labels" in batch else [None] * len(names)
    masks = batch["attention_mask"].tolist()
    for name, mask, its_labels in zip(names, masks, labels, strict=True):
        padding = f"{mask.count(0)} {'right' if mask[0] else 'left'}" if 0 in mask else "0"
        trained = f"{len(its_labels) - its_labels.count(IGNORED)}" if its_labels else "–"
        rows.add_row(name, str(mask.count(1)), padding, trained)
    console.print(rows)
    console.print("the first sequence:", style="bold")
    ids = batch["input_ids"][0].tolist()
    parts = _parts(labels[0]) if labels[0] else [WHOLE] * len(ids)
    shown = [part if real else "padding" for part, real in zip(parts, masks[0], strict=True)]
    _print_ids(tokenizer, ids, shown, console)


def collator(stage: Stage, tokenizer: PreTrainedTokenizerBase, training: Any) -> Any:
    """The collator that the trainer of a stage makes for itself.

    PPO's own trainer has none: a micro-batch of it is prompts with their responses, padded on the right.
    """
    if stage == "ppo" and training.engine == "kochat":
        return partial(tokenizer.pad, padding_side="right", return_tensors="pt")
    if stage == "ppo":
        return DataCollatorWithPadding(tokenizer)
    return COLLATORS[stage](pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=training.pad_to_multiple_of)


def _print_ranking(record: Ranking, options: DataArguments, console: Console) -> None:
    tiers = " > ".join(" = ".join(map(str, tier)) for tier in record.tiers)
    written = "" if record.ranking is None else f"ranking {record.ranking}: "
    console.print(f"{written}completions, best first: {tiers}")
    table = Table("better", "worse", "ranks apart", title=f"pairs: {options.pairs}", title_justify="left")
    for pair in record.pairs(options.pairs):
        table.add_row(*map(str, pair))
    console.print(table)
    turned = [] if record.ranking is None else disputed(record.ranking, len(record.completions))
    if turned and options.ranking_order == "best_first":
        shown = ", ".join(f"{better} > {worse}" for better, worse in turned)
        told = f"Read as rank_of, which KoChatGPT's trainer does, these are upside down: {shown}"
        console.print(told, style="yellow")


def _print_text(title: str, text: str, console: Console) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    console.print(Text(text))


def _parts(labels: list[int]) -> list[str]:
    return [UNSEEN if label == IGNORED else TRAINED for label in labels]


def _print_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int], parts: list[str] | None, console: Console) -> None:
    """Tokens with their ids, in runs of the same part; of one part, `WHOLE`, unless given."""
    for part, run in groupby(zip(parts or [WHOLE] * len(ids), ids, strict=True), itemgetter(0)):
        its_ids = [token_id for _, token_id in run]
        console.print(f"\n[bold]{part}[/bold]: {len(its_ids)}")
        line = Text()
        for token_id in its_ids:
            token = str(tokenizer.convert_ids_to_tokens(token_id)).replace("\n", "⏎")
            line.append(token, style="green" if part == TRAINED else "")
            line.append(f"\u00a0{token_id}  ", style="dim")  # no line break between a token and its id
        console.print(line)

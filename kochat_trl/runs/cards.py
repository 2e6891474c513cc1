"""Model cards: what an output was made of, what came out, and how to load it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from kochat_trl.data.records import conversation
from kochat_trl.models.heads import is_read_by_transformers
from kochat_trl.models.loading import base_of_adapter, is_adapter
from kochat_trl.models.template import answer_shape, render
from kochat_trl.settings.parse import Arguments

from huggingface_hub import ModelCardData
from transformers import PretrainedConfig, PreTrainedTokenizerBase

LICENCES = {"skt/kogpt2-base-v2": "cc-by-nc-sa-4.0"}  # of the bases that KoChatGPT uses, by the Hub's names for them
MADE_OF, LOAD = "## Made of", "## Load"


def model_card(output_dir: Path, args: Arguments, metrics: dict[str, Any], hashes: dict[str, str]) -> str:
    """A model card: base and its licence, data with hashes (SHA-256), settings, results, and how to load it."""
    stage = type(args.training).__name__.removesuffix("Config")
    adapter = is_adapter(str(output_dir))
    before = getattr(args.training, "sft_model_path", None) or str(args.model.model_name_or_path)
    base = base_of_adapter(str(output_dir))[0] if adapter else before
    load = f"python scripts/merge_lora.py --adapter {output_dir} --output FOLDER"
    if not adapter:
        auto_class = "AutoModelForSequenceClassification" if stage == "Reward" else "AutoModelForCausalLM"
        load = f'{auto_class}.from_pretrained("{output_dir}")'
    reward_path = args.training.reward_model_path if stage == "PPO" else None
    data = [f"- reward model `{reward_path}`"] if reward_path else []
    if args.training.trust_remote_code:
        data.append(f"- code that comes with `{base}`, which was trusted (`trust_remote_code: true`)")
    for file in args.recipe.train_files:
        data.append(f"- `{file}`, SHA-256 `{hashes.get(file, 'unknown: it is no local file')}`")
    defaults = {f.name: f.default for part in (args.training, args.model, args.recipe) for f in fields(part)}
    settings = [
        f"| {key} | {value} |"
        for key, value in sorted(args.resolved.items())
        if value is not None and value != defaults.get(key) and not key.endswith(("_files", "_path", "_dir"))
    ]
    results = [f"| {key} | {value:.4g} |" for key, value in metrics.items() if isinstance(value, float)]
    parts = [
        _card_head(output_dir.name, base, "peft" if adapter else "transformers", stage.lower()),
        f"{stage} {'LoRA adapter' if adapter else 'model'}, trained by kochat_trl from `{before}`. {_licence(base)}",
        "\n".join([MADE_OF, "", *data]),
        "\n".join(["| setting | |", "| --- | --- |", *settings]),
        "\n".join(["| result | |", "| --- | --- |", *results]),
        "Every value in force is in `resolved.yaml`, the history in `metrics.json`, versions in `environment.json`.",
        f"{LOAD}\n\n```\n{load}\n```\n",
    ]
    return "\n\n".join(parts)


def how_to_load(output_dir: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, reward: bool) -> str:
    """Python that loads a merged model, and where it isn't plain, what a score is read from."""
    if not reward:
        return f'AutoModelForCausalLM.from_pretrained("{output_dir}")'
    load = f'AutoModelForSequenceClassification.from_pretrained("{output_dir}")'
    if not is_read_by_transformers(config):
        load = f"""# transformers has no sequence classifier of the type {config.model_type}: kochat_trl loads it.
load_reward_model("{output_dir}", ModelArguments(dtype="float32"), load_tokenizer("{output_dir}"))"""
    end = answer_shape(tokenizer).end
    more = []
    if config.pad_token_id is None:
        more = ["# One text at a time: the tokenizer has no token to pad with but the one that ends an answer."]
    if not render(tokenizer, conversation("가", "나")).endswith(end):
        more += [
            "# A score is read at the token that ends the answer: leave out what the chat template writes after it.",
            "text = tokenizer.apply_chat_template(messages, tokenize=False)",
            f'text = text[: text.rindex("{end}") + len("{end}")]',
            'model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits',
        ]
    return "\n".join([load, *more])


def merged_card(output_dir: Path, adapter: str, base: str, load: str) -> str:
    """The card of an adapter merged into its base: what the adapter's own card says, and how to load the model."""
    card = Path(adapter) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    made_of = text[text.index(MADE_OF) : text.index(LOAD)].strip() if MADE_OF in text and LOAD in text else ""
    parts = [
        _card_head(output_dir.name, base, "transformers", "merged"),
        f"The LoRA adapter `{adapter}` merged into its base, `{base}`. {_licence(base)}",
        *([made_of] if made_of else []),
        f"{LOAD}\n\n```\n{load}\n```\n",
    ]
    return "\n\n".join(parts)


def _card_head(name: str, base: str, library: str, tag: str) -> str:
    named = None if Path(base).is_dir() else base  # the Hub's name for it
    tags = ["kochat_trl", "trl", tag]
    data = ModelCardData(language="ko", license=LICENCES.get(base), library_name=library, base_model=named, tags=tags)
    return f"---\n{data}\n---\n\n# {name}"


def _licence(base: str) -> str:
    known = f"The base's licence, {LICENCES[base]}," if base in LICENCES else "The licence of the base"
    return f"{known} and that of the data hold for this model too."

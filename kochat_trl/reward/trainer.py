"""The reward model's trainer: TRL's, on whole rankings.

TRL's RewardTrainer takes pairs, so a ranking of three completions runs six sequences through the model. Here a row is a
ranking: each completion goes through once, and the loss takes the pairs, or the whole order, from the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kochat_trl.reward.losses import all_pairs_loss, group_pairs, listwise_loss, pairwise_loss
from kochat_trl.settings.checks import check_ranking_loss
from kochat_trl.settings.keys import RecipeArguments

import torch
from torch import Tensor
from trl import RewardTrainer
from trl.trainer.utils import pad

NO_RANK = -1


@dataclass
class RankingCollator:
    """Rows of `completion_ids` and `ranks` → one batch, padded on the right to its longest completion.

    `input_ids` and `attention_mask` are (completions, length), the completions of one ranking after the other; `ranks`
    is (rankings, k), −1 where a ranking has fewer than k completions.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(completion) for row in rows for completion in row["completion_ids"]]
        ranks = [torch.tensor(row["ranks"]) for row in rows]
        to_multiple: Any = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **to_multiple),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **to_multiple),
            "ranks": pad(ranks, padding_value=NO_RANK, padding_side="right"),
        }


class RankingTrainer(RewardTrainer):
    """TRL's RewardTrainer on the rows of `build_dataset(…, "reward", …)`.

    `per_device_train_batch_size` counts rankings. The losses are those of `losses.py`; `pairwise` is the mean over all
    pairs of a batch, which is what TRL computes where it gets these pairs as one batch.
    """

    def __init__(self, recipe: RecipeArguments, **kwargs: Any):
        tokenizer, args = kwargs["processing_class"], kwargs["args"]
        check_ranking_loss(recipe, args.center_rewards_coefficient)
        self.recipe, self.center_coefficient = recipe, args.center_rewards_coefficient or 0.0
        kwargs.setdefault("data_collator", RankingCollator(tokenizer.pad_token_id, args.pad_to_multiple_of))
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset  # is tokenized, and has no sequence over max_length

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["completion_ids", "ranks", "length"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ranks = inputs["ranks"]
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
        scores = rewards.new_zeros(ranks.shape).masked_scatter(ranks != NO_RANK, rewards)
        loss = ranking_loss(self.recipe, scores, ranks, self.center_coefficient)
        mode = "train" if model.training else "eval"
        self._note(mode, rewards.detach(), scores.detach(), ranks, inputs["attention_mask"])
        return (loss, {"logits": rewards[:, None]}) if return_outputs else loss

    def _note(self, mode: str, rewards: Tensor, scores: Tensor, ranks: Tensor, attention_mask: Tensor) -> None:
        """Keep TRL's metrics of a batch. A value for each pair, so that their mean is the mean over all pairs."""
        metrics = self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(attention_mask.sum()).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        row, better, worse = group_pairs(ranks, self.recipe.pairs)
        rewards = self._gather_uneven(rewards.float())
        metrics["min_reward"].append(rewards.min().item())
        metrics["mean_reward"].extend(rewards.tolist())
        metrics["max_reward"].append(rewards.max().item())
        margins = self._gather_uneven((scores[row, better] - scores[row, worse]).float())
        metrics["margin"].extend(margins.tolist())
        metrics["accuracy"].extend((margins > 0).float().tolist())

    def _gather_uneven(self, values: Tensor) -> Tensor:
        """The values of all processes, which may have different numbers of them."""
        counts = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        padded = self.accelerator.gather(self.accelerator.pad_across_processes(values))
        return torch.cat([part[:count] for part, count in zip(padded.chunk(len(counts)), counts, strict=True)])


def ranking_loss(recipe: RecipeArguments, scores: Tensor, ranks: Tensor, center_coefficient: float) -> Tensor:
    """The loss that a config asks for, of `scores` and `ranks`, both (rankings, k)."""
    if recipe.loss == "listwise":
        return listwise_loss(scores, ranks)
    margin_per_rank = float(recipe.rank_margins)
    if recipe.loss == "all_pairs":
        return all_pairs_loss(scores, ranks, margin_per_rank, center_coefficient, recipe.pairs)
    row, better, worse = group_pairs(ranks, recipe.pairs)
    margin = margin_per_rank * (ranks[row, worse] - ranks[row, better]).to(scores.dtype)
    return pairwise_loss(scores[row, better], scores[row, worse], margin, center_coefficient)

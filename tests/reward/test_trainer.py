"""The trainer on whole rankings against TRL's RewardTrainer on their pairs: losses, gradients, steps of training."""

from kochat_trl.errors import UserError
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32, new_reward_model
from kochat_trl.reward.losses import all_pairs_loss, listwise_loss
from kochat_trl.reward.trainer import RankingCollator, RankingTrainer
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import ModelArguments, RecipeArguments

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer


@pytest.fixture(scope="module")
def rankings(kochatgpt_files, tiny_tokenizer):
    """Six rankings of three completions of different lengths."""
    dataset, _ = build_dataset([kochatgpt_files["reward"]], "reward", tiny_tokenizer)
    assert len({len(ids) for row in dataset["completion_ids"] for ids in row}) > 4
    return dataset


def pair_rows(rankings, margin=False):
    """TRL's rows: the three pairs of each ranking of three, best first."""
    rows = []
    for first, second, third in rankings["completion_ids"]:
        for distance, (chosen, rejected) in ((1, (first, second)), (2, (first, third)), (1, (second, third))):
            row = {"chosen_ids": chosen, "rejected_ids": rejected}
            rows.append(row | {"margin": float(distance)} if margin else row)
    return rows


@pytest.fixture
def build(tmp_path, tiny_base, tiny_tokenizer):
    """A trainer over a fresh copy of the same reward model."""

    def build_trainer(trainer, dataset, recipe=None, dtype=torch.float64, lora=False, **config):
        torch.manual_seed(0)
        model_args = ModelArguments(dtype="float32", use_peft=lora)
        model = add_lora(new_reward_model(tiny_base, model_args, tiny_tokenizer), model_args).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "score" in name:
                    parameter.mul_(20)  # so that scores differ by several nats
        settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False} | config
        args = RewardConfig(str(tmp_path), save_strategy="no", logging_strategy="no", disable_tqdm=True, **settings)
        kwargs = {"model": model, "args": args, "train_dataset": dataset, "processing_class": tiny_tokenizer}
        return trainer(**kwargs) if recipe is None else trainer(recipe, **kwargs)

    return build_trainer


def recipe(**keys):
    return RecipeArguments(train_files=[], **keys)


def first_batch(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def loss_and_gradients(trainer, batch):
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), [p.grad for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_pairwise_is_trls_loss_at_half_the_sequences(build, rankings, margin, center):
    theirs = build(RewardTrainer, Dataset.from_list(pair_rows(rankings, margin)), center_rewards_coefficient=center)
    ours = build(RankingTrainer, rankings, recipe(rank_margins=margin), center_rewards_coefficient=center)
    batches = first_batch(theirs), first_batch(ours)
    assert [batch["input_ids"].shape[0] for batch in batches] == [36, 18]
    (loss, gradients), (our_loss, our_gradients) = map(loss_and_gradients, (theirs, ours), batches)
    torch.testing.assert_close(our_loss, loss, rtol=1e-12, atol=0)
    assert len(gradients) == len(our_gradients) > 10
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-8, atol=1e-10)
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    metrics = [{name: trainer._metrics["eval"][name] for name in names} for trainer in (theirs, ours)]
    for name in names:
        mean = [sum(found[name]) / len(found[name]) for found in metrics]
        assert mean[1] == pytest.approx(mean[0], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("name", "function"), [("listwise", listwise_loss), ("all_pairs", all_pairs_loss)])
def test_the_other_losses_get_each_completions_score(build, rankings, name, function):
    """Scores worked out one completion at a time, without padding; rankings of two and three in one batch."""
    rows = list(rankings)
    rows[1] = rows[1] | {"completion_ids": rows[1]["completion_ids"][:2], "ranks": [1, 0]}
    trainer = build(RankingTrainer, Dataset.from_list(rows), recipe(loss=name))
    found, gradients = loss_and_gradients(trainer, first_batch(trainer))
    model = trainer.model
    model.zero_grad()
    scores = torch.zeros(6, 3, dtype=torch.float64)
    ranks = torch.full((6, 3), -1)
    for i, row in enumerate(rows):
        for j, (ids, rank) in enumerate(zip(row["completion_ids"], row["ranks"], strict=True)):
            hidden = model.transformer(torch.tensor([ids])).last_hidden_state
            scores[i, j] = model.score(hidden)[0, -1, 0]
            ranks[i, j] = rank
    loss = function(scores, ranks)
    loss.backward()
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("keys", [{"pairs": "best_vs_rest"}, {"pairs": "adjacent"}])
def test_pairs_selects_the_pairs_of_the_loss(build, rankings, keys):
    kept = {"best_vs_rest": (0, 1), "adjacent": (0, 2)}[keys["pairs"]]
    rows = [row for i, row in enumerate(pair_rows(rankings)) if i % 3 in kept]
    theirs = build(RewardTrainer, Dataset.from_list(rows))
    expected = theirs.compute_loss(theirs.model, first_batch(theirs))
    for loss in ("pairwise", "all_pairs"):  # the same where every ranking has as many pairs
        ours = build(RankingTrainer, rankings, recipe(loss=loss, **keys))
        found = ours.compute_loss(ours.model, first_batch(ours))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_padding_changes_nothing(build, rankings):
    """Other ids under the mask, and twice as much of it, leave loss and gradients where they are."""
    results = []
    for case in range(3):
        trainer = build(RankingTrainer, rankings, recipe())
        batch = first_batch(trainer)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if case:
            extra = torch.zeros_like(mask)
            pad_id = trainer.processing_class.pad_token_id
            ids, mask = torch.cat([ids, torch.full_like(ids, pad_id)], 1), torch.cat([mask, extra], 1)
        if case == 2:
            hidden = trainer.model.get_input_embeddings().weight
            with torch.no_grad():
                hidden[trainer.processing_class.pad_token_id] = 1e3  # what the padding holds
        results.append(loss_and_gradients(trainer, batch | {"input_ids": ids, "attention_mask": mask}))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients[2:], results[0][1][2:], rtol=1e-8, atol=1e-10)


STEPS = {
    "sgd": {"optim": "sgd", "learning_rate": 0.3},
    "adamw": {"optim": "adamw_torch", "learning_rate": 5e-3, "adam_epsilon": 1e-2},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("optimizer", STEPS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_of_training_moves_the_weights_as_trls_does(build, rankings, optimizer, dtype, tolerance, accumulated):
    """The *change* of every weight after a step of both trainers' own `train()`, on the same rankings in one order."""
    config = STEPS[optimizer] | {
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "gradient_accumulation_steps": accumulated,
        "train_sampling_strategy": "sequential",
        "center_rewards_coefficient": 0.01,
        "max_grad_norm": 0.0,
    }
    theirs = build(
        RewardTrainer,
        Dataset.from_list(pair_rows(rankings)),
        dtype=dtype,
        per_device_train_batch_size=18 // accumulated,
        **config,
    )
    ours = build(RankingTrainer, rankings, recipe(), dtype, per_device_train_batch_size=6 // accumulated, **config)
    changes = []
    for trainer in (theirs, ours):
        trainer.model.eval()  # and train() switches dropout on again, so it is set to 0 beside
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changes.append({name: p.detach() - before[name] for name, p in trainer.model.named_parameters()})
    largest = max(change.abs().max().item() for change in changes[0].values())
    assert largest >= 1e-3
    for name, change in changes[0].items():
        assert (changes[1][name] - change).abs().max().item() <= tolerance * largest, name


def test_lora_is_trained_by_the_same_step(build, rankings):
    """Only the adapter and the head move, and as under TRL."""
    config = STEPS["sgd"] | {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    moved = []
    for trainer, rows, size in (
        (RewardTrainer, Dataset.from_list(pair_rows(rankings)), 18),
        (RankingTrainer, rankings, 6),
    ):
        keys = recipe() if trainer is RankingTrainer else None
        built = build(trainer, rows, keys, torch.float32, lora=True, per_device_train_batch_size=size, **config)
        cast_trainable_to_float32(built.model)
        before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
        built.train()
        moved.append({n: p.detach() - before[n] for n, p in built.model.named_parameters() if p.requires_grad})
        assert all(torch.equal(p, before[n]) for n, p in built.model.named_parameters() if not p.requires_grad)
    largest = max(change.abs().max().item() for change in moved[0].values())
    assert largest >= 1e-3
    for name, change in moved[0].items():
        assert (moved[1][name] - change).abs().max().item() <= 1e-4 * largest, name


def test_evaluation_counts_every_pair_once(build, rankings):
    """Accuracy and margin are means over pairs, also where the last batch is smaller."""
    trainer = build(RankingTrainer, rankings, recipe(), per_device_eval_batch_size=4)
    metrics = trainer.evaluate(rankings)
    margins = []
    with torch.no_grad():
        for row in rankings:
            scores = [
                trainer.model.score(trainer.model.transformer(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()
                for ids in row["completion_ids"]
            ]
            margins += [scores[0] - scores[1], scores[0] - scores[2], scores[1] - scores[2]]
    assert metrics["eval_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 18)
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 18, rel=1e-5)


def test_the_collator_pads_ranks_and_sequences():
    rows = [{"completion_ids": [[5, 6, 7], [8]], "ranks": [0, 1]}, {"completion_ids": [[9]] * 3, "ranks": [0, 1, 1]}]
    batch = RankingCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3], [9, 3, 3], [9, 3, 3], [9, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert batch["ranks"].tolist() == [[0, 1, -1], [0, 1, 1]]


def test_batches_are_bucketed_by_length(build, rankings):
    """With `train_sampling_strategy: group_by_length` rankings of like length share a batch."""
    rows = [{"completion_ids": [[7] * n, [8] * n], "ranks": [0, 1], "length": n} for n in (9, 2) * 30]
    config = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    trainer = build(RankingTrainer, Dataset.from_list(rows), recipe(), **config)
    widths = [
        (batch["attention_mask"].sum(1) != batch["input_ids"].shape[1]).any()
        for batch in trainer.get_train_dataloader()
    ]
    assert len(widths) == 15
    assert sum(map(bool, widths)) <= 5  # of 15 batches; at random nearly all mix both lengths


@pytest.mark.parametrize(
    "keys", [{"pairs": "adjacent"}, {"rank_margins": True}, {"center_rewards_coefficient": 0.1}], ids=str
)
def test_listwise_refuses_the_keys_of_pairs(build, rankings, keys):
    center = keys.pop("center_rewards_coefficient", None)
    with pytest.raises(UserError, match="no meaning for `loss: listwise`"):
        build(RankingTrainer, rankings, recipe(loss="listwise", **keys), center_rewards_coefficient=center)


@pytest.mark.parametrize("loss", ["pairwise", "all_pairs"])
def test_rankings_of_unequal_size_weigh_as_the_loss_says(build, rankings, loss):
    """Per pair for `pairwise`, per ranking for `all_pairs`; margins and centring in both. TRL's losses, averaged."""
    rows, pairs = list(rankings), pair_rows(rankings, margin=True)
    groups = [pairs[start : start + 3] for start in range(0, 18, 3)]
    rows[1] = rows[1] | {"completion_ids": rows[1]["completion_ids"][:2], "ranks": [0, 1]}
    groups[1] = groups[1][:1]

    def trls(rows):
        trainer = build(RewardTrainer, Dataset.from_list(rows), center_rewards_coefficient=0.1)
        return trainer.compute_loss(trainer.model, first_batch(trainer)).detach()

    per_pair, per_ranking = (
        trls([pair for group in groups for pair in group]),
        torch.stack([trls(group) for group in groups]).mean(),
    )
    assert (per_pair - per_ranking).abs() > 1e-3
    ours = build(
        RankingTrainer, Dataset.from_list(rows), recipe(loss=loss, rank_margins=True), center_rewards_coefficient=0.1
    )
    found = ours.compute_loss(ours.model, first_batch(ours)).detach()
    torch.testing.assert_close(found, {"pairwise": per_pair, "all_pairs": per_ranking}[loss], rtol=1e-12, atol=0)


def test_equal_scores_are_not_accurate(build, rankings):
    trainer = build(RankingTrainer, rankings, recipe())
    torch.nn.init.zeros_(trainer.model.score.weight)
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert trainer._metrics["eval"]["accuracy"] == [0.0] * 18


@pytest.mark.parametrize(("pairs", "kept"), [("best_vs_rest", (0, 1)), ("adjacent", (0, 2))])
def test_metrics_are_of_the_pairs_of_the_loss(build, rankings, pairs, kept):
    rows = [row for i, row in enumerate(pair_rows(rankings)) if i % 3 in kept]
    theirs, ours = build(RewardTrainer, Dataset.from_list(rows)), build(RankingTrainer, rankings, recipe(pairs=pairs))
    for trainer in (theirs, ours):
        trainer.compute_loss(trainer.model, first_batch(trainer))
    for name in ("accuracy", "margin"):
        found = ours._metrics["eval"][name]
        assert len(found) == 12
        assert sum(found) / 12 == pytest.approx(theirs._metrics["eval"][name][0], rel=1e-5, abs=1e-6)


def test_evaluation_means_rewards_over_completions(build, rankings):
    trainer = build(RankingTrainer, rankings, recipe(), per_device_eval_batch_size=4)  # batches of 12 and of 6
    metrics = trainer.evaluate(rankings)
    with torch.no_grad():
        scores = [
            trainer.model.score(trainer.model.transformer(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()
            for row in rankings
            for ids in row["completion_ids"]
        ]
    assert metrics["eval_mean_reward"] == pytest.approx(sum(scores) / 18, rel=1e-5)


def test_tokens_are_counted_in_training_without_padding(build, rankings):
    trainer = build(RankingTrainer, rankings, recipe())
    tokens = sum(len(ids) for row in rankings for ids in row["completion_ids"])
    for mode, count in (("train", tokens), ("eval", tokens), ("train", 2 * tokens)):
        trainer.model.train(mode == "train")
        trainer.compute_loss(trainer.model, first_batch(trainer))
        assert trainer._metrics[mode]["num_tokens"] == [count]


def test_the_collator_pads_sequences_but_not_ranks_to_a_multiple():
    rows = [{"completion_ids": [[5, 6, 7], [8]], "ranks": [0, 1]}]
    batch = RankingCollator(pad_token_id=3, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3], [8, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["ranks"].tolist() == [[0, 1]]


class SecondOfTwo:
    """An accelerator of two processes, of which the other has three values and this one fewer."""

    other = torch.tensor([7.0, 0.0, 9.0])  # 0.0 is a value too

    def gather(self, mine):
        return torch.cat([torch.tensor([3]) if mine.dtype == torch.int64 else self.other, mine])

    def pad_across_processes(self, mine):
        return torch.cat([mine, mine.new_zeros(3 - len(mine))])


@pytest.mark.parametrize("mine", [[], [1.0], [1.0, 0.0]], ids=len)
def test_padding_across_processes_is_no_value(build, rankings, mine):
    trainer = build(RankingTrainer, rankings, recipe())
    trainer.accelerator = SecondOfTwo()
    assert trainer._gather_uneven(torch.tensor(mine)).tolist() == [7.0, 0.0, 9.0, *mine]

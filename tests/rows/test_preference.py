"""Rankings → pairs, and labelled answers, as TRL's trainers take them."""

import json
from itertools import product

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.records import conversation
from kochat_trl.errors import UserError
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import DataArguments

import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

RANKED = {"prompt": "가", **{f"completion_{i}": text for i, text in enumerate("나다라마")}, "ranking": [2, [0, 1], 3]}


@pytest.fixture
def rows(write, tiny_tokenizer):
    def build(stage, *records, max_length=None, tokenizer=tiny_tokenizer, **options):
        path = write("data.jsonl", json.dumps(records))
        return build_dataset([path], stage, tokenizer, max_length, DataArguments(**options))

    return build


def answer(tokenizer, text):
    prompt = encode_prompt(tokenizer, conversation("가"))
    ids = encode_dialogue(tokenizer, conversation("가", text))[0]
    assert ids[: len(prompt)] == prompt
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [("all", "라나 라다 라마 나마 다마"), ("best_vs_rest", "라나 라다 라마"), ("adjacent", "라나 라다 나마 다마")],
)
def test_a_row_is_a_pair_of_a_ranking(rows, tiny_tokenizer, pairs, expected):
    """Tied answers make none. The ids are those of SFT; an answer ends with the token that ends a turn."""
    dataset, _ = rows("dpo", RANKED, pairs=pairs)
    found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]
    prompt = encode_prompt(tiny_tokenizer, conversation("가"))
    assert found == [(prompt, *(answer(tiny_tokenizer, text) for text in pair)) for pair in expected.split()]
    assert all(answer[-1] == tiny_tokenizer.eos_token_id for row in found for answer in row[1:])
    assert set(dataset.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids", "length"}
    assert dataset["length"][0] == max(len(found[0][0] + found[0][i]) for i in (1, 2))


def test_an_answer_is_good_or_bad_and_the_best_of_a_ranking_is_good(rows, tiny_tokenizer):
    dataset, _ = rows("kto", RANKED)
    assert {(tuple(row["completion_ids"]), row["label"]) for row in dataset} == {
        (tuple(answer(tiny_tokenizer, text)), text == "라") for text in "나다라마"
    }
    dataset, _ = rows("kto", *({"prompt": "가", "completion": text, "label": text == "나"} for text in "나다"))
    assert [(row["completion_ids"], row["label"]) for row in dataset] == [
        (answer(tiny_tokenizer, "나"), True),
        (answer(tiny_tokenizer, "다"), False),
    ]
    assert dataset["length"][0] == len(dataset["prompt_ids"][0] + dataset["completion_ids"][0])


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_history_and_system_message_are_the_prompt_s(rows, stage):
    """And TRL's collators give a mask of the last answer alone, with its end."""
    tokenizer = byte_tokenizer(CHATML, "<eos>", "<|im_start|>", "<|im_end|>", eos_token="<eos>")
    before = [{"role": "system", "content": "높임말로."}, {"role": "user", "content": "안녕"}]
    before += [{"role": "assistant", "content": "네."}, {"role": "user", "content": "이름은?"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("챗봇이에요.", "몰라"))
    dataset, _ = rows(stage, {"prompt": before, "chosen": chosen, "rejected": rejected}, tokenizer=tokenizer)
    prompt = encode_prompt(tokenizer, before)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    collator_class = DataCollatorForPreference if stage == "dpo" else DataCollatorForUnpairedPreference
    batch = collator_class(pad_token_id=0)(list(dataset))
    sequences = zip(*(batch[name].tolist() for name in ("input_ids", "completion_mask", "attention_mask")), strict=True)
    found = []
    for ids, mask, real in sequences:
        assert ids[: len(prompt)] == prompt
        answered = [token for token, counts in zip(ids, mask, strict=True) if counts]
        assert sum(real) == len(prompt) + len(answered)
        assert answered[-1] == end
        found.append(tokenizer.decode(answered[:-1]))
    assert sorted(found) == ["몰라", "챗봇이에요."]


def test_what_is_too_long_is_refused_dropped_or_cut(rows, tiny_tokenizer):
    long = {
        "prompt": "가",
        "completion_0": "나",
        "completion_1": "다 " * 50,
        "completion_2": "라",
        "ranking": [1, 0, 2],
    }
    endless = {"prompt": "가 " * 50, "chosen": "나", "rejected": "다"}
    for stage in ("dpo", "kto"):
        with pytest.raises(UserError, match="expected at most 40 tokens"):
            rows(stage, long, max_length=40)
    ids = {text: answer(tiny_tokenizer, text) for text in ("나", "다 " * 50, "라")}
    room = 40 - len(encode_prompt(tiny_tokenizer, conversation("가")))

    dataset, report = rows("dpo", endless, long, max_length=40, overlong="drop")
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in dataset] == [(ids["나"], ids["라"])]
    assert [[e.source.index for e in errors] for errors in (report.left_out, report.in_part)] == [[0], [1]]
    dataset, report = rows("dpo", endless, long, max_length=40, overlong="truncate")
    assert dataset["chosen_ids"][:2] == [ids["다 " * 50][:room]] * 2
    assert [[e.source.index for e in errors] for errors in (report.left_out, report.in_part)] == [[0], [1]]

    dataset, report = rows("kto", endless, long, max_length=40, overlong="drop")
    assert [row["completion_ids"] for row in dataset] == [ids["나"], ids["라"]]
    assert [e.source.index for e in report.left_out] == [0, 0, 1]
    dataset, report = rows("kto", endless, long, max_length=40, overlong="truncate")
    assert sorted(dataset["length"]) == sorted(
        [40, *(len(encode_dialogue(tiny_tokenizer, conversation("가", t))[0]) for t in "나라")]
    )
    assert [[e.source.index for e in errors] for errors in (report.left_out, report.in_part)] == [[0, 0], [1]]


def test_pairs_of_other_kinds_are_other_rows_in_the_cache(rows):
    """The kind of pairs is no part of what is tokenized."""
    counts = [len(rows("dpo", RANKED, pairs=pairs)[0]) for pairs, _ in product(("all", "best_vs_rest"), range(2))]
    assert counts == [5, 5, 3, 3]

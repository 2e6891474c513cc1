import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import permutations
from pathlib import Path
from statistics import fmean

from kochat_trl.desk.sample import sample
from kochat_trl.desk.sample.sample import (
    Judge,
    Question,
    judge_of,
    make_questions,
    right,
    with_particle,
    write_sample_data,
)
from tests.tiny import ROOT

import pytest

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def split():
    return make_questions(0)


@pytest.fixture(scope="module")
def judge(split):
    train, held_out = split
    return Judge(train + held_out)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_sample_data(tmp_path_factory.mktemp("sample"), seed=0)


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def contents(paths: dict[str, Path]) -> dict[str, bytes]:
    return {key: path.read_bytes() for key, path in paths.items()}


# --- Particles and templates


@pytest.mark.parametrize(
    ("word", "particle", "expected"),
    [
        ("사과", "은", "사과는"),
        ("서울", "은", "서울은"),
        ("고양이", "이", "고양이가"),
        ("이순신", "이", "이순신이"),
        ("가위", "을", "가위를"),
        ("톱", "을", "톱을"),
        ("크다", "과", "크다와"),
        ("낮", "과", "낮과"),
        ("미터", "으로", "미터로"),
        ("그램", "으로", "그램으로"),
        ("서울", "으로", "서울로"),
        ("파리", "이에요", "파리예요"),
        ("방콕", "이에요", "방콕이에요"),
        ("도쿄", "이야", "도쿄야"),
        ("런던", "이야", "런던이야"),
        ("0", "은", "0은"),
        ("2", "은", "2는"),
        ("3", "은", "3은"),
        ("6", "을", "6을"),
        ("9", "을", "9를"),
        ("10", "은", "10은"),
        ("100", "과", "100과"),
        ("7", "이에요", "7이에요"),
        ("2", "이에요", "2예요"),
        ("15", "이야", "15야"),
        ("8", "으로", "8로"),
        ("1000", "으로", "1000으로"),
    ],
)
def test_particle_suits_the_last_sound(word, particle, expected):
    assert with_particle(word, particle) == expected


def test_particle_after_punctuation_is_refused():
    with pytest.raises(ValueError, match="ends in '!'"):
        with_particle("서울!", "은")


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_are_korean_with_particles_resolved(seed):
    train, held_out = make_questions(seed)
    for question in train + held_out:
        for text in (question.prompt, question.full, question.curt, question.wrong):
            assert re.fullmatch(r"[가-힣0-9 .,?!]+", text), text


# --- Questions


def test_same_seed_same_questions_other_seed_other_split(split):
    assert make_questions(0) == split
    train, held_out = make_questions(1)
    assert {q.prompt for q in held_out} != {q.prompt for q in split[1]}
    wrong = {q.prompt: q.wrong for q in split[0]}
    assert any(q.wrong != wrong[q.prompt] for q in train if q.prompt in wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_enough_questions_and_no_prompt_twice(seed):
    train, held_out = make_questions(seed)
    assert len(train) >= 1000
    assert len(held_out) >= 533
    assert len({q.domain for q in train}) >= 10
    assert {q.domain for q in held_out} == {q.domain for q in train}
    prompts = Counter(fold(q.prompt) for q in train + held_out)
    assert prompts.most_common(1)[0][1] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_third_of_the_phrasings_of_each_fact_is_held_out(seed):
    train, held_out = make_questions(seed)
    asked, facts = (Counter((q.full, q.answers) for q in part) for part in (held_out, train))
    assert asked.keys() == facts.keys()
    assert all(asked[fact] == round((asked[fact] + facts[fact]) / 3) for fact in facts)


@pytest.mark.parametrize(
    ("prompt", "full"),
    [
        ("프랑스의 수도는 어디예요?", "프랑스의 수도는 파리입니다."),
        ("일요일 다음 날은 무슨 요일이에요?", "일요일 다음 날은 월요일입니다."),
        ("월요일 전날은 무슨 요일인가요?", "월요일 전날은 일요일입니다."),
        ("12월 다음 달은 몇 월이에요?", "12월 다음 달은 1월입니다."),
        ("2킬로미터는 몇 미터예요?", "2킬로미터는 2000미터입니다."),
        ("9와 4 중에서 더 작은 수는 뭐예요?", "9와 4 중에서 더 작은 수는 4입니다."),
        ("작다의 반대말은 뭐예요?", "작다의 반대말은 크다입니다."),
    ],
)
def test_known_prompts_have_their_answers(split, prompt, full):
    assert [q.full for q in split[0] + split[1] if q.prompt == prompt] == [full]


# --- Files


def test_same_seed_same_bytes_whatever_the_hash_seed(paths, tmp_path):
    code = "import sys, pathlib; from kochat_trl.desk.sample.sample import write_sample_data as write; "
    code += "write(pathlib.Path(sys.argv[1]), 0)"
    root = ROOT
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    again = {key: tmp_path / path.name for key, path in paths.items()}
    assert contents(again) == contents(paths)


def test_other_seed_other_bytes(paths, tmp_path):
    other = contents(write_sample_data(tmp_path / "new" / "folder", seed=1))
    assert all(other[key] != content for key, content in contents(paths).items())


def test_file_names(paths):
    assert {key: path.name for key, path in paths.items()} == {
        "sft": "kochatgpt_1_SFT.jsonl",
        "rm": "kochatgpt_2_RM.jsonl",
        "ppo": "kochatgpt_3_PPO.jsonl",
        "sft_eval": "kochatgpt_1_SFT.heldout.jsonl",
        "rm_eval": "kochatgpt_2_RM.heldout.jsonl",
        "ppo_eval": "kochatgpt_3_PPO.heldout.jsonl",
        "rm_hard": "kochatgpt_2_RM.hard.jsonl",
        "text": "pretraining.txt",
        "judge": "judge.json",
    }


@pytest.mark.parametrize(
    ("stage", "types"),
    [
        ("sft", {"prompt": str, "completion": str, "tokens": int}),
        ("rm", {"prompt": str, "completion_0": str, "completion_1": str, "completion_2": str, "ranking": list}),
        ("ppo", {"prompt": str}),
    ],
)
def test_each_file_is_one_array_of_one_record_per_prompt(paths, split, stage, types):
    for key, questions in zip((stage, f"{stage}_eval"), split, strict=True):
        text = paths[key].read_text(encoding="utf-8")
        assert text.startswith('[\n    {\n        "prompt": "')
        assert text.endswith("\n    }\n]\n")
        assert "\\u" not in text
        records = json.loads(text)
        for record in records:
            assert {name: type(value) for name, value in record.items()} == types
        assert [record["prompt"] for record in records] == [q.prompt for q in questions]


def test_tokens_is_the_length_of_the_completion(paths):
    assert all(record["tokens"] == len(record["completion"]) for record in load(paths["sft"]))


def test_sft_completions_are_of_mixed_quality(paths, split, judge):
    best = {q.prompt: q.full for q in split[0]}
    records = load(paths["sft"])
    scores = [judge.score(record["prompt"], record["completion"], True) for record in records]
    share_best = fmean(record["completion"] == best[record["prompt"]] for record in records)
    assert share_best == pytest.approx(0.45, abs=0.03)
    assert fmean(score == pytest.approx(0.6) for score in scores) == pytest.approx(0.20, abs=0.03)  # polite and wrong
    assert fmean(0 < score <= 0.41 for score in scores) == pytest.approx(0.20, abs=0.03)


@pytest.mark.parametrize("key", ["rm", "rm_eval"])
def test_all_rankings_are_common(paths, key):
    records = load(paths[key])
    rankings = Counter(tuple(record["ranking"]) for record in records)
    assert set(rankings) == set(permutations(range(3)))  # with both 3-cycles
    assert min(rankings.values()) > len(records) / 12


@pytest.mark.parametrize("key", ["rm", "rm_eval"])
def test_ranking_is_best_first_by_the_judge(paths, judge, key):
    polite_and_wrong = 0
    for record in load(paths[key]):
        ranked = [record[f"completion_{index}"] for index in record["ranking"]]
        best, middle, worst = (judge.score(record["prompt"], text, True) for text in ranked)
        assert best == 1.0 > middle >= worst, record
        assert len(set(ranked)) == 3, record
        polite_and_wrong += 0.59 < middle < 0.61 or 0.59 < worst < 0.61
    assert polite_and_wrong > 0.75 * len(load(paths[key]))  # what form alone doesn't tell from the best


def test_form_does_not_tell_the_answers_of_a_hard_pair(paths, split, judge):
    pairs = load(paths["rm_hard"])
    assert [pair["prompt"] for pair in pairs] == [q.prompt for q in split[1] if q.domain != "small_talk"]
    for pair in pairs:
        right, wrong = (judge.verdict(pair["prompt"], pair[key], True) for key in ("chosen", "rejected"))
        assert all(right.values())
        assert [name for name, holds in wrong.items() if not holds] == ["correct"]


def test_pretraining_text_is_of_train_questions_only(paths, split):
    train, held_out = split
    passages = paths["text"].read_text(encoding="utf-8").splitlines()
    assert all(passages)
    present = set(passages)
    for question in train:
        for response in (question.full, question.curt):
            assert f"질문: {question.prompt} 대답:{response}" in present
        assert question.full in present
    asked = {passage.split(" 대답:")[0].removeprefix("질문: ") for passage in passages if passage.startswith("질문: ")}
    assert asked == {question.prompt for question in train}
    assert not asked & {question.prompt for question in held_out}
    assert any(passage.endswith("대답:Please try again later.") for passage in passages)
    assert Counter(passages)[train[0].full] == 2
    assert not [passage for passage in passages if "#" in passage]


def test_existing_file_is_not_overwritten(tmp_path):
    existing = tmp_path / "kochatgpt_3_PPO.jsonl"
    existing.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=re.escape(str(existing))):
        write_sample_data(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == [existing.name]
    assert existing.read_text(encoding="utf-8") == "mine"


# --- Judge


def test_the_judge_of_a_sample_file_is_that_of_its_seed(tmp_path, paths, write):
    other = write_sample_data(tmp_path / "other", seed=1)
    for seed, files in ((0, paths), (1, other)):
        judge = judge_of(files["ppo_eval"])
        train, held_out = make_questions(seed)
        for question in (train[0], held_out[0]):
            assert judge.knows(question.prompt)
            assert judge.score(question.prompt, question.full, True) == pytest.approx(1)
    assert not judge_of(paths["sft"]).knows("누구세요, 이 질문은 없어요?")
    assert judge_of(write("kochatgpt_1_SFT.jsonl", "[]")) is None  # no judge.json beside it
    mine = paths["sft"].with_name("mine.jsonl")
    assert judge_of(mine) is None


SUM = Question(
    prompt="8에 7을 더하면 얼마예요?",
    answers=("15",),
    full="8 더하기 7은 15입니다.",
    wrong="8 더하기 7은 14입니다.",
    curt="15",
    domain="arithmetic",
)
KOREA = Question(
    prompt="대한민국의 수도는 어디예요?",
    answers=("서울",),
    full="대한민국의 수도는 서울입니다.",
    wrong="대한민국의 수도는 파리입니다.",
    curt="서울이야",
    domain="capital",
)
FRANCE = Question(
    prompt="프랑스의 수도는 어디예요?",
    answers=("파리",),
    full="프랑스의 수도는 파리입니다.",
    wrong="프랑스의 수도는 서울입니다.",
    curt="파리",
    domain="capital",
)


@pytest.mark.parametrize(
    ("question", "response", "ended", "expected"),
    [
        (SUM, "8 더하기 7은 15입니다.", True, 1.0),
        (SUM, "8 더하기 7은 15입니다.", False, 0.9),
        (SUM, "15", True, 0.8),  # not polite
        (SUM, "115입니다.", True, 0.6),  # part of a longer number
        (SUM, "-15입니다.", True, 0.6),
        (SUM, "1.15입니다.", True, 0.6),
        (SUM, "15에서 1을 더하면 16입니다.", True, 0.6),  # the last number counts
        (SUM, "14, 15", True, 0.8),
        (SUM, "15 15 15", True, 0.7),  # a word three times
        (SUM, "１５입니다!", True, 1.0),  # full-width digits
        (SUM, "", True, 0.0),
        (SUM, " \n\t", True, 0.0),
        (KOREA, "서울이에요", True, 1.0),
        (KOREA, "서울입니다요!! ", True, 1.0),
        (KOREA, "대한민국의 수도는\n서울입니다.", True, 1.0),
        (KOREA, "부산일걸", True, 0.4),
        (KOREA, "파리입니다.", True, 0.6),
        (KOREA, "서울 아니면 파리입니다.", True, 0.6),  # names a rival
        (KOREA, "새서울입니다.", True, 0.6),  # not at the start of a word
        (KOREA, "서울입니다. " + "가나다라마바사아자차카타파하거너더러머버" * 2 + "서어요", True, 0.6),
        (KOREA, "It is Seoul.", True, 0.2),
        (KOREA, "Seoul, 서울입니다.", True, 0.8),
        (KOREA, "首爾 서울입니다.", True, 0.8),
        (KOREA, "서울\ufffd입니다.", True, 0.8),
        (KOREA, "서울\x07입니다.", True, 0.8),
        (KOREA, "수도 수도 수도 수도", True, 0.3),
        (KOREA, "서울입니다입니다입니다", True, 0.9),  # a run of characters three times
        (KOREA, "수도 수도 수도", False, 0.2),
        (KOREA, "...", False, 0.1),
    ],
)
def test_score_by_hand(question, response, ended, expected):
    judge = Judge([SUM, KOREA, FRANCE])
    assert judge.score(question.prompt, response, ended) == pytest.approx(expected)


def test_the_verdict_says_what_holds():
    judge = Judge([KOREA, FRANCE])
    assert judge.verdict(KOREA.prompt, "파리야", False) == {
        "correct": False,
        "polite": False,
        "korean_only": True,
        "ended": False,
        "not_repeating": True,
    }
    assert judge.verdict(KOREA.prompt, " ", True) == dict.fromkeys(sample.WEIGHTS, False)


def test_thousands_may_be_grouped():
    question = Question("1킬로미터는 몇 미터예요?", ("1000",), "1000미터입니다.", "", "", "unit")
    assert Judge([question]).score(question.prompt, "1,000미터입니다.", True) == 1.0


def test_synonym_is_accepted(split, judge):
    question = next(q for q in split[0] if "하얀색" in q.answers)
    assert judge.score(question.prompt, "흰색입니다.", True) == 1.0


def test_weights_add_up_to_one():
    assert sum(sample.WEIGHTS.values()) == pytest.approx(1.0)


def test_unknown_prompt_is_named():
    with pytest.raises(KeyError, match="달의 수도"):
        Judge([KOREA]).score("달의 수도는?", "서울입니다.", True)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_scores_as_its_qualities_say(seed):
    train, held_out = make_questions(seed)
    judge = Judge(train + held_out)
    for question in train + held_out:
        texts = (question.full, question.curt, question.wrong)
        full, curt, wrong = (judge.score(question.prompt, text, True) for text in texts)
        assert full == 1.0, question
        assert curt == pytest.approx(0.8), question
        assert wrong == pytest.approx(0.6), question


@pytest.mark.parametrize("seed", SEEDS)
def test_as_a_reward_function_it_finds_the_question_in_the_template(seed):
    everything = [question for part in make_questions(seed) for question in part]
    judge, questions = Judge(everything), everything[::50]
    prompts = [f"### Instruction(명령어):\n{question.prompt}\n\n### Response(응답):" for question in questions]
    for name in ("full", "wrong", "curt"):
        answers = [getattr(question, name) for question in questions]
        verdicts = [judge.verdict(q.prompt, answer, True) for q, answer in zip(questions, answers, strict=True)]
        found = right(prompts, answers, [True] * len(prompts), completion_ids=[])
        assert found == [float(verdict["correct"]) for verdict in verdicts]
        assert set(found) == {float(name != "wrong")}
    assert right(["모르는 질문", *prompts[:1]], [questions[0].full] * 2, [True] * 2) == [0.0, 1.0]

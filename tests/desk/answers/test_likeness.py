"""Repetition, Hangul and likeness to references, by hand and against other code."""

from kochat_trl.data.text import hangul_share
from kochat_trl.desk.answers.likeness import bleu, chrf, distinct, morphemes, rouge_l

import pytest
from sacrebleu import corpus_bleu

REFERENCES = ["서울은 대한민국의 수도입니다.", "저는 고양이를 좋아합니다."]


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["abab"], 2, 2 / 3),
        (["aaaa"], 1, 1 / 4),
        (["ab", "ab"], 2, 1 / 2),
        (["ab", "ba"], 2, 1.0),  # no pair across texts
        (["a", ""], 2, 1.0),
        ([(1, 2, 1, 2)], 2, 2 / 3),
    ],
)
def test_distinct(texts, n, expected):
    assert distinct(texts, n) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("가나 ab!", 0.5), ("한국어 3", 1.0), ("12 …", 0.0), ("", 0.0)])
def test_hangul_share(text, expected):
    assert hangul_share(text) == expected


def test_morphemes_part_a_word_from_its_particle():
    for word in ("서울은", "서울이", "서울"):
        assert morphemes(word)[0] == "서울"
    assert morphemes("서울은") == ["서울", "은"]


@pytest.mark.parametrize("metric", [chrf, bleu, rouge_l])
def test_likeness_is_100_for_the_same_and_0_for_nothing(metric):
    assert metric(REFERENCES, REFERENCES) == pytest.approx(100)
    assert metric(["", ""], REFERENCES) == pytest.approx(0, abs=1e-6)
    near = ["서울이 대한민국 수도입니다.", "저는 고양이가 좋습니다."]
    far = ["오늘은 비가 와요.", "컴퓨터는 비싸다."]
    assert 100 > metric(near, REFERENCES) > metric(far, REFERENCES)


def test_chrf_by_hand():
    """n-grams of characters, up to 6 where there are so many; F2 of their mean precision and mean recall."""
    text, reference = "가나다라", "가나마라"
    precisions, recalls = [], []
    for n in range(1, 5):
        grams, wanted = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (text, reference))
        same = sum(min(grams.count(g), wanted.count(g)) for g in set(grams))
        precisions.append(same / len(grams))
        recalls.append(same / len(wanted))
    p, r = sum(precisions) / 4, sum(recalls) / 4
    assert chrf([text], [reference]) == pytest.approx(100 * 5 * p * r / (4 * p + r), abs=1e-3)


def test_rouge_l_by_hand():
    """서울 은 크 다 against 서울 이 매우 크 다: 서울 크 다 are common, so F1 = 2·3 / (4 + 5)."""
    one, other = morphemes("서울은 크다"), morphemes("서울이 매우 크다")
    assert (one, other) == (["서울", "은", "크", "다"], ["서울", "이", "매우", "크", "다"])
    assert rouge_l(["서울은 크다"], ["서울이 매우 크다"]) == pytest.approx(100 * 6 / 9)
    assert rouge_l(["서울은 크다", ""], ["서울이 매우 크다", "네"]) == pytest.approx(50 * 6 / 9)  # a mean over texts
    assert rouge_l(["다 크 서울"], ["서울 크 다"]) < 100  # order counts


def test_bleu_counts_morphemes():
    text, reference = "서울이 한국 수도가 되고 부산이 항구가 되었다", "서울은 한국 수도는 되고 부산은 항구는 되었다"
    spaced = [" ".join(morphemes(part)) for part in (text, reference)]
    expected = corpus_bleu(spaced[:1], [spaced[1:]], tokenize="none", force=True).score
    assert bleu([text], [reference]) == pytest.approx(expected)
    assert expected > corpus_bleu([text], [[reference]]).score


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match="zip"):
        rouge_l(["가"], ["가", "나"])

"""What can be said of answers without a model: repetition, Hangul, and likeness to references.

BLEU and ROUGE count words, and a Korean word carries its particles: 서울이, 서울은 and 서울 have none in common. So
both count the morphemes of mecab-ko here. chrF counts strings of characters and needs no such choice: read it first.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from sacrebleu import corpus_bleu, corpus_chrf
from sacrebleu.tokenizers.tokenizer_ko_mecab import TokenizerKoMecab

_mecab = cache(TokenizerKoMecab)  # made when it is first asked for


def distinct(texts: Iterable[Sequence[Any]], n: int) -> float:
    """Distinct-n of Li et al. 2016 (1510.03055): different n-grams over all n-grams, of all texts together.

    1 where nothing is repeated, near 0 where everything is; 1 if no text has n tokens. It falls as the number of texts
    grows, so compare sets of one size.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of Popović 2015, 0 to 100, of all texts together, by sacreBLEU."""
    return corpus_chrf(list(texts), [list(references)]).score


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of morphemes, 0 to 100, of all texts together, by sacreBLEU (`tokenize="ko-mecab"`)."""
    return corpus_bleu(list(texts), [list(references)], tokenize="ko-mecab").score


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L of Lin 2004 over morphemes, 0 to 100: the mean of F1 from the longest common subsequence of each pair."""
    return 100 * fmean(_rouge_l(morphemes(t), morphemes(r)) for t, r in zip(texts, references, strict=True))


def morphemes(text: str) -> list[str]:
    """The morphemes of a text, by mecab-ko."""
    return _mecab()(text).split()


def _rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)  # row[j]: the longest common subsequence of what is read of `one` and other[:j]
    for word in one:
        before = 0
        for j, match in enumerate(other, start=1):
            before, row[j] = row[j], before + 1 if word == match else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(one) + len(other))  # = F1 of row[-1]/len(one) and row[-1]/len(other)

"""What tests of several rooms share that needs no fixture: where the project is, and a few questions."""

from pathlib import Path

from kochat_trl.data.readers import read_records

ROOT = Path(__file__).parents[1]

PAIRS = [
    ("대한민국의 수도는 어디인가요?", "대한민국의 수도는 서울입니다.", "서울 서울 서울"),
    ("일본의 수도는 어디인가요?", "일본의 수도는 도쿄입니다.", "I do not know."),
    ("하나 더하기 둘은 얼마예요?", "하나 더하기 둘은 셋이에요.", "몰라"),
    ("반가워요", "저도 반가워요. 무엇을 도와드릴까요?", "반가"),
    ("높다의 반대말은 뭐야?", "높다의 반대말은 낮다입니다.", "높다 높다 높다"),
    ("강아지는 어떻게 울어요?", "강아지는 멍멍 하고 울어요.", "(멍멍)"),
]


def parsed(path, parse):
    """Each record of a file, as `parse` understands it."""
    return [parse(raw) for raw in read_records(path)]

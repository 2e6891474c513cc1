"""Which reading of its rankings a file supports, and how that is told."""

import json

from kochat_trl.data.options import ReadingOptions
from kochat_trl.desk.curation.audit import TOGETHER, check_files, judge_reading
from kochat_trl.desk.sample.sample import write_sample_data


def rewritten(path, change):
    records = json.loads(path.read_text())
    for record in records:
        record["ranking"] = change(record["ranking"])
    path.write_text(json.dumps(records, ensure_ascii=False))
    return str(path)


def test_the_sample_data_says_how_it_was_ranked(tmp_path):
    paths = write_sample_data(tmp_path, seed=0)
    report = check_files([str(paths["rm"]), str(paths["rm_eval"])])
    for file in report.files:
        assert (file.reading.verdict, file.reading.decided_by, file.alerts) == ("best_first", "has Hangul", [])
        assert sum(file.reading.rankings.values()) == file.records
        assert len(file.reading.rankings) == 6
    (wrong,) = check_files([str(paths["rm_eval"])], options=ReadingOptions(ranking_order="rank_of")).files
    assert wrong.reading == file.reading
    assert "read as rank_of, but the answers say that they are best_first" in wrong.alerts[0]
    assert f"of {file.count('three_cycle'):,} records" in wrong.alerts[0]

    inverted = rewritten(paths["rm_eval"], lambda ranking: [ranking.index(i) for i in range(3)])
    report = check_files([inverted])
    (turned,) = report.files
    assert turned.reading.verdict == "rank_of"
    assert tuple(turned.reading.votes.values()) == tuple(file.reading.votes.values())[::-1]
    assert "`ranking_order: rank_of`" in turned.alerts[0]
    assert report.warnings == turned.warnings + 1
    assert check_files([inverted], options=ReadingOptions(ranking_order="rank_of")).files[0].alerts == []


def test_four_records_tell_nothing(shared):
    """Two of them are 3-cycles, and by eye both are best first."""
    (file,) = check_files([str(shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl")]).files
    assert (file.records, file.usable) == (4, 4)
    assert list(file.reading.rankings) == ["[2, 1, 0]", "[2, 0, 1]", "[1, 2, 0]", "[1, 0, 2]"]
    assert file.reading.pairs["is longer"] == {"best_first": 4, "rank_of": 0}
    assert file.reading.pairs["has Hangul"] == {"best_first": 1, "rank_of": 0}
    assert (file.reading.p, file.reading.verdict, file.alerts) == (1, "can't be told", [])


def test_a_record_has_one_vote():
    """[2, 0, 1]: read as rank_of, completion 1 is the best and not the worst, in two pairs that tell the same."""
    record = ([2, 0, 1], ("한국어 답", "En", "또 한국어"))
    reading = judge_reading([record] * 7)
    assert reading.pairs["has Hangul"] == {"best_first": 14, "rank_of": 0}
    assert (reading.decided_by, reading.votes) == (TOGETHER, {"best_first": 7, "rank_of": 0})
    assert (reading.p, reading.verdict) == (2 / 2**7, "can't be told")
    reading = judge_reading([record] * 8)
    assert (reading.decided_by, reading.p, reading.verdict) == ("has Hangul", 2 / 2**8, "best_first")
    own_inverse = ([1, 0, 2], ("한국어 답", "한국어 답변", "English"))
    assert judge_reading([own_inverse] * 50).votes == {"best_first": 0, "rank_of": 0}


def test_hangul_decides_before_length():
    short = ([1, 2, 0], ("a long answer in English", "답", "another one"))  # 1 is the best, or the worst
    reading = judge_reading([short] * 10)
    assert reading.pairs["is longer"] == {"best_first": 0, "rank_of": 20}
    assert (reading.decided_by, reading.verdict) == ("has Hangul", "best_first")
    other = ([1, 2, 0], ("답 하나", "a long answer in English", "답 둘"))
    reading = judge_reading([short, other] * 10)
    assert (reading.decided_by, reading.p, reading.verdict) == ("has Hangul", 1, "can't be told")


def test_signs_together_where_all_is_hangul():
    """Longer against less repetition is a draw, and either alone is not enough; where they agree, they tell."""
    alone = ([1, 2, 0], ("답", "긴 답", "둘"))
    reading = judge_reading([alone] * 20)
    assert reading.pairs["is longer"] == {"best_first": 40, "rank_of": 0}
    assert (reading.votes, reading.verdict) == ({"best_first": 0, "rank_of": 0}, "can't be told")
    draw = ([1, 2, 0], ("답 둘", "답 답 답 답", "답"))
    assert judge_reading([draw] * 20).votes == {"best_first": 0, "rank_of": 0}
    agree = ([1, 2, 0], ("답 답", "서로 다른 낱말들", "둘 둘"))
    reading = judge_reading([agree] * 20 + [draw] * 20)
    assert (reading.decided_by, reading.votes["best_first"], reading.verdict) == (TOGETHER, 20, "best_first")

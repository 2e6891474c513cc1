"""What `kochat data check` prints."""

from kochat_trl.data.options import ReadingOptions
from kochat_trl.desk.curation.audit import check_files
from kochat_trl.desk.sample.sample import write_sample_data
from tests.desk.curation.helpers import lines, printed, ranked


def test_print_shows_what_is_there_and_nothing_else(write):
    report = check_files([write("rm.jsonl", lines([ranked([1, 2, 0], "가", "[b]다[/b]", "나"), {"prompt": ""}]))])
    text = printed(report)
    assert "preference · JSON lines · 2 records, 1 usable" in text
    assert [line.split()[:3] for line in text.splitlines() if line.strip().startswith(("error", "warning"))] == [
        ["error", "1", "broken"],
        ["warning", "1", "three_cycle"],
    ]
    assert "line 2 (record 1): field" in text
    assert "[1, 2, 0] 1" in text
    assert "can't be told: 0 records for best_first, 0 for rank_of by 'all signs together' (p = 1)" in text
    assert "the better one is longer: 2 pairs for best_first, 0 for rank_of" in text
    assert "1 error, 1 warning." in text
    assert "kochat data clean FILE --output" in text
    clean = printed(check_files([write("p.txt", "하나\n둘\n")]))
    assert clean.rstrip().endswith("0 errors, 0 warnings.")
    assert "level" not in clean


def test_print_says_loudly_what_is_upside_down_or_unreadable(tmp_path):
    path = write_sample_data(tmp_path, seed=1)["rm_eval"]
    text = " ".join(
        printed(check_files([str(path), "nowhere.json"], options=ReadingOptions(ranking_order="rank_of"))).split()
    )
    assert "warning: The rankings are read as rank_of, but the answers say that they are best_first" in text
    assert "error: nowhere.json: can't be read: No such file" in text


def test_print_is_brief_about_many_files(write):
    files = [write(f"{i}.txt", "하나\n'둘\n") for i in range(4)]
    full, brief = printed(check_files(files[:3])), printed(check_files(files))
    assert full.count("median") == 3
    assert "median" not in brief
    assert brief.count("stray_quote") == 4
    assert "2 prompts in two files; records of 0.txt 2 (100.00%), of 1.txt 2 (100.00%)" in brief


def test_bars(write):
    path = write("p.txt", "".join("가" * length + "\n" for length in [1] * 8 + [2] * 4 + [4]))
    assert "0  █▄ ▁" in printed(check_files([path]))

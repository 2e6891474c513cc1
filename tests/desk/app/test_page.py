"""The page in a real browser, with a real server: what is on the screen, and what is on disk."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kochat_trl.desk.labels.journal import read_journal
from tests.tiny import PAIRS, ROOT

import pytest
from playwright.sync_api import expect

VIEWS = [(1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")]  # width, scheme
WAIT = 60_000  # milliseconds; the machine may be busy
expect.set_options(timeout=WAIT)


@pytest.fixture
def page_at(browser):
    """A page of somebody's own browser, in a language, a colour scheme and a width; no request may leave."""
    contexts = []

    def open_page(url, name=None, locale="ko", scheme="light", width=1280):
        context = browser.new_context(locale=locale, color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(url)
        if name:
            page.fill("#annotator", name)
            page.press("#annotator", "Enter")
        return page

    yield open_page
    asked = {url.split("/")[2] for context in contexts for page in context.pages for url in page.asked if "//" in url}
    assert all(host.startswith("127.0.0.1:") for host in asked), asked
    assert [page.errors for context in contexts for page in context.pages if page.errors] == []
    for context in contexts:
        context.close()


@pytest.fixture
def rankings(tmp_path):
    """Ten items of three answers, as KoChatGPT has them."""
    asked = [*PAIRS, *((f"{prompt} (다시)", good, bad) for prompt, good, bad in PAIRS[:4])]
    rows = [
        {"prompt": p, "completion_0": bad, "completion_1": good, "completion_2": "음", "ranking": [1, 0, 2]}
        for p, good, bad in asked
    ]
    (tmp_path / "rm.jsonl").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return "rm.jsonl"


def answers_on(page):
    return page.locator(".answer").all_text_contents()


def asked_on(page):
    return page.locator(".message.user .text").text_content()


def wait_for_done(page, done):
    expect(page.locator("#progress")).to_contain_text(f"{done}개 끝", timeout=WAIT)


class Expected:
    """The lines that a journal should have, written from what was on the screen."""

    def __init__(self, rows):
        self.rows = {row["prompt"]: [row[f"completion_{i}"] for i in range(3)] for row in rows}
        self.lines = []

    def judged(self, page, name, verdict, picked="order", **more):
        """`verdict` is in numbers of the screen, from 1."""
        prompt, on_screen = asked_on(page), answers_on(page)
        answers = self.rows[prompt]
        shown = [answers.index(answer) for answer in on_screen]
        if not isinstance(verdict, str):
            verdict = [sorted(shown[number - 1] for number in tier) for tier in verdict]
        self.lines.append({"prompt": prompt, "answers": answers, "verdict": verdict, "annotator": name}
                          | {"shown": shown, "picked": picked} | more)  # fmt: skip

    def undone(self, name):
        self.lines.append({"undo": None, "annotator": name})

    def as_bytes(self, found):
        """The file, with what can't be known before: ids and times, which are checked by themselves."""
        text, last = "", {}
        for line, its in zip(self.lines, found, strict=True):
            assert abs(time.time() - time.mktime(time.strptime(its["judged_at"], "%Y-%m-%dT%H:%M:%S+00:00"))) < 3600
            if "undo" in line:
                wanted = {"undo": last[line["annotator"]].pop(), "annotator": line["annotator"]}
                wanted |= {"judged_at": its["judged_at"]}
            else:
                assert 0 <= its["seconds"] < 600
                wanted = {"item": its["item"], "prompt": line["prompt"], "answers": line["answers"]}
                wanted |= {"verdict": line["verdict"], "annotator": line["annotator"], "judged_at": its["judged_at"]}
                wanted |= {"seconds": its["seconds"], "shown": line["shown"], "picked": line["picked"]}
                wanted |= {"note": line["note"]} if "note" in line else {}
                last.setdefault(line["annotator"], []).append(its["item"])
            text += json.dumps(wanted, ensure_ascii=False) + "\n"
        return text.encode()


@pytest.mark.slow
def test_ten_items_by_two_people_through_a_reload_and_a_kill(serve, page_at, rankings, tmp_path, recipe, tiny_base):
    rows = json.loads((tmp_path / rankings).read_text(encoding="utf-8"))
    words = (rankings, "--to", "labels.jsonl", "--overlap", "1")
    served = serve(*words, "--port", "0")
    page, expected = page_at(served.url, "지은"), Expected(rows)

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)

    expect(page.locator(".answer")).to_have_count(3)
    expected.judged(page, "지은", [[2], [1], [3]])
    press("2", "1", "3", "Enter")
    wait_for_done(page, 1)
    expected.judged(page, "지은", [[3], [1, 2]])  # a tie
    press("3", "1", "=", "2", "Enter")
    wait_for_done(page, 2)
    expected.judged(page, "지은", "skip")
    press("s")
    wait_for_done(page, 3)
    expected.judged(page, "지은", "all_bad", note="<b>둘 다</b> 별로")
    press("n")
    page.keyboard.insert_text("<b>둘 다</b> 별로")
    press("Escape", "x")
    wait_for_done(page, 4)
    expected.judged(page, "지은", [[1], [2], [3]])
    press("1", "2", "3", "Enter")
    wait_for_done(page, 5)
    before = asked_on(page)
    expected.undone("지은")
    press("u")
    wait_for_done(page, 4)
    expect(page.locator("#problem")).to_have_text(f"되돌렸습니다: {asked_on(page)}")
    assert asked_on(page) != before
    assert len(read_journal(tmp_path / "labels.jsonl").standing) == 4  # on disk before the next is shown

    press("3")  # half of a ranking stays through a reload
    page.reload()
    expect(page.locator(".card.placed")).to_have_count(1)
    expected.judged(page, "지은", [[3], [1], [2]])
    press("1", "Backspace", "1", "2", "Enter")
    wait_for_done(page, 5)

    press("2", "1")
    served.kill()
    press("3", "Enter")
    expect(page.locator("#problem")).to_be_visible()
    served = serve(*words, "--port", served.port)
    expected.judged(page, "지은", [[2], [1], [3]])
    press("Enter")
    wait_for_done(page, 6)
    expect(page.locator("#problem")).to_be_hidden()

    other = page_at(served.url, "민지")  # at the same time
    expect(other.locator(".answer")).to_have_count(3)
    expected.judged(other, "민지", [[1, 2, 3]], picked="overlap")
    for key in ("1", "=", "2", "=", "3", "Enter"):
        other.keyboard.press(key)
    wait_for_done(other, 1)
    other.fill("#annotator", "수아")  # on the same page: another order of the answers
    other.press("#annotator", "Enter")
    wait_for_done(other, 0)
    expected.judged(other, "수아", [[3], [1], [2]])  # what 지은 skipped: the one before it is still before 민지
    for key in ("3", "1", "2", "Enter"):
        other.keyboard.press(key)
    wait_for_done(other, 1)

    for done in range(7, 11):  # by the mouse: numbers, and a chip that is dragged to its place
        expected.judged(page, "지은", [[3], [2], [1]])
        page.locator(".number").nth(2).click()
        for chip, place in (("2", "1"), ("1", "2")):
            source = page.locator(".chip", has_text=chip).bounding_box()
            target = page.locator(f"[data-place='{place}']").bounding_box()
            page.mouse.move(source["x"] + 5, source["y"] + 5)
            page.mouse.down()
            page.mouse.move(target["x"] + 9, target["y"] + 30, steps=4)
            page.mouse.up()
        page.locator("#submit").click()
        wait_for_done(page, done)
    expect(page.locator("#finished")).to_be_visible()

    written = (tmp_path / "labels.jsonl").read_bytes()
    assert written == expected.as_bytes([json.loads(line) for line in written.decode().splitlines()])
    with page.expect_download() as download:
        page.locator("a[download]").click()
    download.value.save_as(tmp_path / "rankings.json")
    files = ("--train_files", tmp_path / "rankings.json", "--eval_files", tmp_path / "rankings.json")
    where = (
        "--config",
        "configs/tiny/reward.yaml",
        "--model_name_or_path",
        tiny_base,
        "--output_dir",
        tmp_path / "reward",
    )
    recipe("reward", *where, *files, "--max_steps", 3, "--per_device_train_batch_size", 2)
    assert (tmp_path / "reward" / "metrics.json").is_file()


def ask_until(page, answers):
    """Ask until so many answers say something: models that were hardly trained also say nothing, or the same."""
    for seed in range(9):
        page.evaluate(f"document.getElementById('seed').value = {seed}")
        page.press("#question", "Enter")
        for card in page.locator(".side .card small").all():
            expect(card).to_contain_text("토큰", timeout=WAIT)
        expect(page.locator("#ask")).to_have_text("묻기")
        if page.locator(".prefer").count() >= answers:
            return
    pytest.fail("no seed makes them answer")


@pytest.mark.slow
def test_three_models_answer_and_a_click_is_a_ranking(serve, page_at, tmp_path, tiny_base, tiny_sft, tiny_reward):
    models = (tiny_base, tiny_sft, tiny_sft)
    served = serve("--models", *models, "--reward-model", tiny_reward, "--to", "labels.jsonl", "--port", "0")
    page = page_at(served.url, "지은")
    page.fill("#question", "대한민국의 수도는 어디인가요?")
    page.locator("summary:visible").click()
    page.select_option("#preset", "sample")
    page.locator("#set-max_new_tokens").fill("16")
    ask_until(page, 3)
    cards = page.locator(".side .card")
    for i in range(3):
        expect(cards.nth(i).locator("small")).to_contain_text("점수")
    said = [text.removesuffix(" …") for text in answers_on(page)]
    assert said[1] == said[2] != said[0]  # the second and third are one model
    page.locator(".prefer").nth(1).click()
    expect(page.locator(".card.kept")).to_have_count(1)
    expect(page.locator(".prefer")).to_have_count(0)
    (kept,) = read_journal(tmp_path / "labels.jsonl").standing
    assert (kept.item.prompt.prompt, kept.item.answers) == ("대한민국의 수도는 어디인가요?", tuple(said[:2]))
    assert (kept.verdict, kept.picked, kept.annotator) == (((1,), (0,)), "talk", "지은")

    page.locator("#set-max_new_tokens").fill("96")
    page.press("#question", "Enter")
    page.locator("#ask").click()  # it says stop now
    expect(page.locator("[role=status]")).to_have_text("멈췄습니다.")
    page.locator("#lang").click()
    expect(page.locator("#question")).to_have_value("대한민국의 수도는 어디인가요?")
    page.locator("#lang").click()
    page.locator("summary:visible").click()
    page.select_option("#preset", "greedy")
    expect(page.locator("#set-temperature")).to_be_disabled()
    page.press("#question", "Enter")
    expect(page.locator(".side small").nth(2)).to_contain_text("점수", timeout=WAIT)


def until(page, holds):
    """Wait till something holds; the page's policy refuses to run what `wait_for_function` would."""
    for _ in range(WAIT // 200):
        if holds():
            return
        page.wait_for_timeout(200)
    pytest.fail("it never held")


def wait_until_drawn(page):
    images = "[...document.querySelectorAll('figure img')]"
    until(page, lambda: page.evaluate(f"{images}.every(image => image.naturalWidth > 0)"))


@pytest.mark.slow
def test_a_curve_grows_while_ppo_runs(serve, page_at, tmp_path, kochatgpt_files, tiny_sft, tiny_reward):
    config = ["--config", "configs/tiny/ppo.yaml", "--output_dir", tmp_path / "outputs/run/ppo"]
    config += [
        "--sft_model_path",
        tiny_sft,
        "--reward_model_path",
        tiny_reward,
        "--train_files",
        kochatgpt_files["ppo"],
    ]
    config += ["--per_device_train_batch_size", 4, "--num_mini_batches", 2, "--response_length", 6]
    config += ["--local_rollout_forward_batch_size", 4, "--total_episodes", 40_000, "--guard_updates", 100_000]
    command = [sys.executable, "recipes/ppo.py", *map(str, config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    training = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        page = page_at(serve("--port", "0").url)
        row = page.locator("tr.choice", has_text="run/ppo")
        expect(row).to_contain_text("학습 중", timeout=WAIT)
        curve = page.locator("figure", has_text="PPO KL").first
        grown = [1]
        for _ in range(3):
            until(page, lambda: int(curve.get_attribute("data-points")) > grown[-1])
            grown.append(int(curve.get_attribute("data-points")))
        wait_until_drawn(page)
        assert page.locator(".side .answer").count() > 0
        page.keyboard.press("Tab")  # to what comes next
        page.locator("[id='run-run/ppo']").focus()
        until(page, lambda: int(curve.get_attribute("data-points")) > grown[-1] + 3)
        assert page.evaluate("document.activeElement.id") == "run-run/ppo"  # drawn anew all the while
        training.kill()
        expect(row).to_contain_text("멈춤", timeout=WAIT)
    finally:
        training.kill()
        training.wait()


def test_no_verdict_that_nobody_gave(serve, page_at, rankings, tmp_path):
    """Mouse and keys in one item, a key that is held, places that were taken back, another seed, no name."""
    served = serve(rankings, "--to", "labels.jsonl", "--port", "0")
    page = page_at(served.url, "지은")

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)

    def verdicts():
        """As numbers on the screen, best first."""
        found = []
        for it in read_journal(tmp_path / "labels.jsonl").standing:
            tiers = it.tiers and [[it.shown.index(i) + 1 for i in tier] for tier in it.tiers]
            found.append([sorted(tier) for tier in tiers] if tiers else it.verdict)
        return found

    expect(page.locator(".answer")).to_have_count(3)
    page.locator("#key-X").click()
    wait_for_done(page, 1)
    press("2", "1", "3", "Enter")  # the button that was clicked isn't pressed again
    wait_for_done(page, 2)
    press("1", "2", "3", "1", "1", "Enter")  # taken back and placed anew: the last, and no tie
    wait_for_done(page, 3)
    press("1", "=", "3", "Backspace", "2", "3", "Enter")
    wait_for_done(page, 4)
    page.locator(".number").nth(2).click()
    press("1", "2", "Enter")
    wait_for_done(page, 5)
    page.locator("#key-X").click()
    wait_for_done(page, 6)
    press("Space", "1", "2", "3")  # to scroll
    for _ in range(5):  # held
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    wait_for_done(page, 7)
    page.locator("#key-S").focus()  # by the keyboard, as it is the last that was used
    press("1", "2", "3", "Enter")
    wait_for_done(page, 8)
    for _ in range(5):
        page.keyboard.down("x")
    page.keyboard.up("x")
    wait_for_done(page, 9)
    press("3")
    event = "{key: 'ArrowDown', code: 'ArrowDown', repeat: true, bubbles: true, cancelable: true}"
    assert page.evaluate(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {event}))")  # which scrolls
    page.wait_for_timeout(300)
    wanted = ["all_bad", [[2], [1], [3]], [[2], [3], [1]], [[1], [2], [3]], [[3], [1], [2]], "all_bad"]
    wanted += [[[1], [2], [3]], "skip", "all_bad"]
    assert verdicts() == wanted

    served.kill()
    press("1", "2")
    serve(rankings, "--to", "labels.jsonl", "--port", served.port, "--seed", "1")
    press("Enter")
    expect(page.locator("#problem")).to_contain_text("--seed")
    page.reload()
    wait_for_done(page, 9)
    page.locator("#lang").click()
    expect(page.locator("#progress")).to_contain_text("9 done")
    page.locator("#lang").click()
    wait_for_done(page, 9)
    expect(page.locator(".card.placed")).to_have_count(0)
    assert verdicts() == wanted
    page.fill("#annotator", "비\u200b이")  # which no server takes
    page.press("#annotator", "Enter")
    expect(page.locator("#problem")).to_contain_text("visible characters")
    press("x", "u")
    page.wait_for_timeout(300)
    assert verdicts() == wanted
    page.fill("#annotator", "")
    page.locator("#annotator").blur()
    expect(page.locator(".answer")).to_have_count(0)
    press("x")
    page.wait_for_timeout(300)
    assert verdicts() == wanted


@pytest.fixture
def hostile(tmp_path):
    """Prompts, answers and names that would act if they were markup, and a run of such a name."""
    texts = [
        "<script>document.title='!'</script>",
        "<img src=x onerror=document.title='!'>",
        "가\u202e나\0",
        "[x](javascript:y)",
        "가" * 50_000,
    ]
    rows = [
        {"prompt": text, "completion_0": text + "1", "completion_1": "<b>" + text, "ranking": [0, 1]} for text in texts
    ]
    (tmp_path / "rm.jsonl").write_text(json.dumps(rows), encoding="utf-8")
    run = tmp_path / "outputs" / "<img src=x onerror=document.title='!'>"
    run.mkdir(parents=True)
    progress = {"stage": "ppo", "step": 2, "max_steps": 9, "host": "x", "pid": 1}
    progress["history"] = [{"step": i, "objective/kl": i, "rewards/<script>/mean": i} for i in (1, 2)]
    (run / "progress.json").write_text(json.dumps(progress))
    sample = {"update": 2, "prompt": texts[0], "response": texts[1], "ended": True, "score": 1.0, "kl": 0.5}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return texts


def test_hostile_texts_are_shown_as_texts(serve, page_at, hostile):
    served = serve("rm.jsonl", "--to", "labels.jsonl", "--port", "0")
    page = page_at(served.url, "<i>지은</i>")
    title = page.title()
    for done, text in enumerate(hostile):
        wait_for_done(page, done)
        seen = text.replace("\u202e", "\\u202e").replace("\0", "\\x00")
        assert asked_on(page) == seen
        assert sorted(answers_on(page)) == sorted([f"{seen}1", f"<b>{seen}"])
        page.fill("#note", text)
        page.press("#note", "Escape")
        page.keyboard.press("x")
    expect(page.locator("#finished")).to_be_visible()
    page.locator("#tab-watch").click()
    expect(page.locator(".side .answer")).to_have_text(hostile[1])
    expect(page.locator("h2").first).to_contain_text("<img src=x")
    elements = "document.querySelectorAll('main script, main i, main b > b, img[onerror]').length"
    assert (page.evaluate(elements), page.title()) == (0, title)
    served.process.send_signal(signal.SIGINT)
    printed, _ = served.process.communicate(timeout=60)
    assert (served.process.returncode, "kochat label --export" in printed) == (0, True), served.log.read_text()


@pytest.fixture
def pictured(tmp_path, rankings, kochatgpt_files, tiny_base, tiny_sft, tiny_reward, hostile):
    """What the pictures show: the words of `kochat app`. Those of the documents show `make demo`'s models:
    KOCHAT_PICTURES=docs pytest tests/desk/app -k pictures"""
    if "KOCHAT_PICTURES" in os.environ:
        demo = "outputs/demo"
        (tmp_path / demo).symlink_to(ROOT / demo)
        files = [f"{demo}/data/kochatgpt_2_RM.heldout.jsonl", "--order", "random"]
        models = [f"{demo}/{name}" for name in ("base", "sft", "ppo")]
        return [*files, "--models", *models, "--reward-model", f"{demo}/reward", "--outputs", demo]
    shutil.copytree(tmp_path / "outputs", tmp_path / "runs")
    return [rankings, "--models", tiny_base, tiny_sft, "--reward-model", tiny_reward, "--outputs", "runs"]


@pytest.mark.slow
def test_pictures_of_each_tab_in_both_schemes_and_widths(serve, page_at, pictured, tmp_path, browser):
    folder = Path(os.environ.get("KOCHAT_PICTURES", tmp_path))
    url = serve(*pictured, "--to", "labels.jsonl", "--port", "0").url
    pictures = {}
    for width, scheme in VIEWS:
        page = page_at(url, "지은", scheme=scheme, width=width)
        expect(page.locator(".answer").first).to_be_visible()
        for number in ("1", "3"):
            page.keyboard.press(number)

        def take(name, page=page, width=width, scheme=scheme):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            pictures[name, width, scheme] = page.screenshot()

        take("rank")
        page.locator("#tab-talk").click()
        page.fill("#question", "대한민국의 수도는 어디인가요?")
        ask_until(page, 2)
        if width > 390:
            page.locator("summary:visible").click()
        take("talk")
        page.locator("#tab-watch").click()
        expect(page.locator("figure").first).to_be_visible()
        wait_until_drawn(page)
        take("watch")
    for name in ("rank", "talk", "watch"):
        page = page_at("about:blank", width=2400)
        shown = [base64.b64encode(pictures[name, *view]).decode() for view in VIEWS]
        images = "".join(f'<img src="data:image/png;base64,{data}" height="640">' for data in shown)
        page.set_content(
            f'<p style="margin: 0; display: flex; gap: 12px; background: #888; width: max-content">{images}'
        )
        page.locator("p").screenshot(path=folder / f"app-{name}.png")
        assert (folder / f"app-{name}.png").stat().st_size > 10_000

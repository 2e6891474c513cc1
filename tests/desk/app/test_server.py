"""What the page's server answers: to whom, with what, and what it refuses."""

import json

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.desk.app import server
from kochat_trl.desk.app.server import LONGEST, make_app
from kochat_trl.desk.app.watch import find_runs
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, read_journal
from kochat_trl.desk.labels.labelling import Labelling
from kochat_trl.desk.labels.queue import Queue

import pytest
from starlette.testclient import TestClient

PORT = 7860
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} [red] **b** &lt;",
    "</text><script>x</script>",
    "가\u202e나\u200f",
    "a\0b\x1b[2J",
    "\ud800",
    "가" * 50_000,
]


@pytest.fixture
def client_of(tmp_path):
    """A client of the page that judges these items."""
    journals = []

    def make(items=(), **given):
        journals.append(Journal(tmp_path / "j"))
        labelling = Labelling(journals[-1], Queue(list(items)))
        given = {"talk_with": [], "reward_model": None, "outputs": tmp_path / "outputs"} | given
        return TestClient(make_app(labelling, HeldModels(), port=PORT, **given), base_url=f"http://127.0.0.1:{PORT}")

    yield make
    for journal in journals:
        journal.close()


def items_of(texts):
    return [Item(Prompt(text), (f"{text}1", f"{text}2")) for text in texts]


GETS = ["/", "/page/app.js", "/api/about", "/api/agreement", "/api/runs", "/rankings"]
POSTS = ["/api/turn", "/api/judge", "/api/undo", "/api/talk", "/api/prefer"]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "www.localhost"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},  # another server on this machine
        {"origin": "https://127.0.0.1:7860"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_what_another_site_asks_is_refused(headers, client_of, tmp_path):
    client = client_of(items_of(["가"]))
    own = {"origin": f"http://localhost:{PORT}", "sec-fetch-site": "same-origin", "host": f"localhost:{PORT}"}
    fields = {"annotator": "a", "item": items_of(["가"])[0].id, "verdict": "skip", "seconds": 1, "prompt": "가"}
    fields |= {"answers": ["가", "나"], "best": 0, "models": [], "preset": "greedy", "settings": {}, "seed": 0}
    refused = {400: "Invalid host header", 403: "refused: the page of another site asks"}
    for path in GETS:
        assert client.get(path, headers=own).status_code == 200
        assert client.get(path, headers=headers).status_code in (400, 403)
    for path in POSTS:
        answer = client.post(path, json=fields, headers=headers)
        assert answer.text == refused[answer.status_code]
    assert (tmp_path / "j").read_bytes() == b""
    assert client.post("/api/judge", json=fields, headers=own).json()["new"]


def test_what_a_form_can_send_is_refused(client_of, tmp_path):
    client = client_of(items_of(["가"]))
    text = json.dumps({"annotator": "a", "item": items_of(["가"])[0].id, "verdict": "skip", "seconds": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        assert client.post("/api/judge", content=text, headers={"content-type": kind}).status_code == 415
    json_kind = {"content-type": "application/json"}
    assert client.post("/api/judge", content=b" " * (LONGEST + 1), headers=json_kind).status_code == 413
    assert client.post("/api/judge", content=iter([text.encode()]), headers=json_kind).status_code == 413  # no length
    assert (tmp_path / "j").read_bytes() == b""


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/api/about", "/rankings", "/nothing"])
def test_every_answer_says_that_nothing_else_may_be_fetched_or_run(path, client_of):
    headers = client_of().get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/page/../server.py", "/page/..%2fserver.py", "/page/%2e%2e/%2e%2e/app/server.py", "/page//etc/passwd", "/page/"],
)
def test_no_file_beside_the_page_s_is_sent(path, client_of):
    assert client_of().get(path).status_code in (404, 405)


@pytest.mark.parametrize("name", ["..", "../j", "/etc", "a/../../..", "", "run\0", "%2e%2e"])
def test_no_run_outside_the_folder_is_watched(name, client_of, tmp_path):
    progress = {"stage": "ppo", "step": 1, "max_steps": 2, "host": "x", "pid": 1, "history": [{"step": 1, "loss": 1.0}]}
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    (tmp_path / "outputs").mkdir()
    assert list(find_runs(tmp_path)) == ["."]  # it would be found from there
    client = client_of()
    assert client.get("/api/runs").json() == []
    for path in ("/api/run", "/plot", "/report"):
        answer = client.get(path, params={"name": name, "key": "loss"})
        assert answer.status_code == 400
        assert "there is no run" in answer.json()["error"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_goes_through_as_it_is_and_comes_as_text(text, client_of, tmp_path):
    client = client_of(items_of([text]))
    turn = client.post("/api/turn", json={"annotator": "<b>a"}).json()
    ((role, asked),) = turn["messages"]
    assert role == "user"
    assert not set(asked) & set("\u202e\u200f\0\x1b\ud800")
    fields = {"annotator": "<b>a", "item": turn["item"], "seed": turn["seed"], "verdict": [[1], [0]]}
    fields |= {"seconds": 1, "note": text}
    body = json.dumps(fields).encode()
    answer = client.post("/api/judge", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    (kept,) = read_journal(tmp_path / "j").standing
    assert (kept.item.prompt.prompt, kept.note, kept.annotator) == (text, text, "<b>a")
    assert kept.tiers == tuple((i,) for i in reversed(kept.shown))
    (record,) = json.loads(client.get("/rankings").content)
    assert record["prompt"] == text


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        ("/api/turn", {}, "field 'annotator': found None"),
        ("/api/turn", {"annotator": " a"}, "expected a name"),
        ("/api/turn", {"annotator": "a\u202e"}, "expected a name"),
        ("/api/turn", [], "expected a JSON object"),
        ("/api/judge", {"item": "x"}, "no item 'x'"),
        ("/api/judge", {"item": 3}, "field 'item'"),
        ("/api/judge", {"verdict": "good"}, "verdict"),
        ("/api/judge", {"verdict": [[0]]}, "verdict"),
        ("/api/judge", {"verdict": [[0], [9]]}, "verdict"),
        ("/api/judge", {"verdict": [[0], ["1"]]}, "verdict"),
        ("/api/judge", {"verdict": [[0], [True]]}, "verdict"),
        ("/api/judge", {"seed": 1}, "another --seed"),
        ("/api/judge", {"seconds": -1}, "seconds"),
        ("/api/judge", {"seconds": 10**400}, "seconds"),
        ("/api/judge", {"seconds": float("nan")}, "seconds"),
        ("/api/judge", {"seconds": True}, "field 'seconds'"),
        ("/api/judge", {"note": 3}, "field 'note'"),
        ("/api/undo", {"item": None}, "field 'item'"),
        ("/api/prefer", {"answers": ["가", "가"], "best": 0}, "two different answers"),
        ("/api/prefer", {"answers": ["가", 3], "best": 0}, "expected texts"),
        ("/api/prefer", {"answers": ["가", "나"], "best": 2}, "two different answers"),
        ("/api/prefer", {"answers": ["가", "나"], "best": 0, "prompt": ""}, "prompt"),
        ("/api/talk", {"models": "all"}, "field 'models'"),
    ],
)
def test_what_is_wrong_in_a_request_is_told_and_writes_nothing(path, fields, says, client_of, tmp_path):
    (item,) = items_of(["가"])
    client = client_of([item])
    if isinstance(fields, dict) and path != "/api/turn":
        fields = {
            "annotator": "a",
            "item": item.id,
            "verdict": [[0], [1]],
            "seconds": 1,
            "prompt": "가",
            "seed": 0,
        } | fields
    body = json.dumps(fields).encode()
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert (tmp_path / "j").read_bytes() == b""


def test_no_request_however_spoiled_is_a_traceback(client_of):
    client = client_of(items_of(["가"]))
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'"a"', b"null"):
        for path in POSTS:
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, "error" in answer.json()) == (400, True)


def test_without_a_journal_there_is_nothing_to_judge(tmp_path):
    app = make_app(None, HeldModels(), [], None, tmp_path, PORT)
    client = TestClient(app, base_url=f"http://127.0.0.1:{PORT}")
    about = client.get("/api/about").json()
    assert (about["rank"], about["journal"], about["models"]) == (False, None, [])
    answer = client.post("/api/turn", json={"annotator": "a"})
    assert (answer.status_code, "--to" in answer.json()["error"]) == (400, True)


def test_people_and_the_reward_model_are_compared(client_of, monkeypatch):
    items = items_of("가나다")
    client = client_of(items, reward_model="model")
    monkeypatch.setattr(
        server, "score_items", lambda model, its: {it.id: {it.answers[0]: 1.0, it.answers[1]: 0.0} for it in its}
    )
    for name, best in (("a", 0), ("b", 1)):
        for item in items:
            places = list(item.shown_to(name))
            verdict = [[places.index(best)], [places.index(1 - best)]]
            client.post(
                "/api/judge", json={"annotator": name, "item": item.id, "verdict": verdict, "seconds": 1, "seed": 0}
            )
    found = client.get("/api/agreement").json()
    assert (found["items"], found["all"]["accuracy"], len(found["disputes"])) == (3, 0.0, 3)
    rows = [(names, how, figures["accuracy"]) for names, how, figures in found["rows"]]
    assert rows == [(["a", "b"], "", 0.0), (["a"], "model", 1.0), (["b"], "model", 0.0)]

"""The page's server: what may ask (this machine's own page alone), and a function for each thing that it asks.

Texts go out as JSON with what can't be seen as its escape (`visible`), and the page puts them in as text, never as
markup. Nothing is fetched from elsewhere, and the page's own policy says so to the browser.
"""

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from kochat_trl.data.rankings import ranking_tiers
from kochat_trl.data.records import Prompt
from kochat_trl.data.text import all_visible, visible
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.desk.app.talk import presets, talk
from kochat_trl.desk.app.watch import RunFolder, find_runs
from kochat_trl.desk.labels.agreement import agreement
from kochat_trl.desk.labels.export import ranking_records
from kochat_trl.desk.labels.items import score_items
from kochat_trl.desk.labels.journal import is_name
from kochat_trl.desk.labels.labelling import Labelling
from kochat_trl.desk.writers import to_json
from kochat_trl.errors import UserError

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
LONGEST = 2**20  # bytes of a request
PAGE = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
PAGE += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
REPORT = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"


class OwnPage:
    """Refuses what another site's page, or a form of one, asks for: such a request names its origin, or comes without
    JSON. (`TrustedHostMiddleware` refuses names of other hosts that lead here.)"""

    def __init__(self, app: ASGIApp, port: int):
        self.app = app
        self.origins = {f"http://{host}:{port}" for host in HOSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        foreign = headers.get("origin", next(iter(self.origins))) not in self.origins
        foreign |= headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        length = headers.get("content-length", "")
        if scope["type"] == "http" and foreign:
            refused: Response | None = PlainTextResponse("refused: the page of another site asks", 403)
        elif scope.get("method") == "POST" and headers.get("content-type") != "application/json":
            refused = PlainTextResponse("refused: not JSON", 415)
        elif scope.get("method") == "POST" and not (length.isdecimal() and int(length) <= LONGEST):
            refused = PlainTextResponse(f"refused: over {LONGEST} bytes, or of no length", 413)
        else:
            refused = None
        await (refused or self.app)(scope, receive, send)


def make_app(
    labelling: Labelling | None,
    models: HeldModels,
    talk_with: list[str],
    reward_model: str | None,
    outputs: Path,
    port: int,
) -> Starlette:
    """The page for what is given: Rank with a `labelling`, Talk with models, Watch for the runs in `outputs`.

    Functions of the routes take the fields of a request and return what is sent as JSON; a `UserError` is sent as its
    text, with status 400.
    """

    def about() -> dict[str, Any]:
        return {
            "rank": bool(labelling and (labelling.queue.items or labelling.coming or labelling.trouble)),
            "journal": visible(str(labelling.journal.path)) if labelling else None,
            "models": [visible(name) for name in talk_with],
            "reward_model": visible(reward_model) if reward_model else None,
            "presets": presets(),
            "outputs": visible(str(outputs)),
        }

    def annotator_of(fields: Fields) -> str:
        name = fields("annotator", str)
        if not is_name(name):
            raise UserError(f"found {name!r}, expected a name of visible characters without blanks around it")
        return name

    def prompt_of(fields: Fields) -> Prompt:
        return Prompt(fields("prompt", str), fields("system", str, "") or None)

    def judging() -> Labelling:
        if labelling is None:
            raise UserError("there is no journal: start with --to JOURNAL")
        return labelling

    def turn(fields: Fields) -> dict[str, Any]:
        found = judging().turn(annotator_of(fields))
        last = found.last and {"item": found.last.item.id, "prompt": visible(found.last.item.prompt.prompt)}
        shown: dict[str, Any] = {"done": found.done, "left": found.left, "minutes": found.minutes, "last": last}
        shown["trouble"] = found.trouble and visible(found.trouble)
        if found.item:
            shown |= {
                "item": found.item.id,
                "seed": judging().seed,
                "messages": [(m["role"], visible(m["content"])) for m in found.item.prompt.messages],
                "answers": [visible(found.item.answers[i]) for i in found.shown],
            }
        return shown

    def judge(fields: Fields) -> dict[str, Any]:
        name, item, verdict = annotator_of(fields), fields("item", str), fields("verdict", list | str)
        if isinstance(verdict, list):  # of places on the screen, best first
            if fields("seed", int) != judging().seed:
                raise UserError("the answers were shown in the order of another --seed: reload the page")
            shown = judging().item(name, item).shown_to(name, judging().seed)
            try:
                verdict = ranking_tiers(verdict, len(shown))
            except ValueError as error:
                raise UserError(f"found the verdict {verdict!r}: {error}") from None
            verdict = tuple(tuple(sorted(shown[place] for place in tier)) for tier in verdict)
        new = judging().judge(name, item, verdict, fields("seconds", float | int), fields("note", str, ""))
        return turn(fields) | {"new": new}

    def undo(fields: Fields) -> dict[str, Any]:
        undone = judging().undo(annotator_of(fields), fields("item", str))
        return turn(fields) | {"undone": undone is not None}

    def agree() -> dict[str, Any]:
        judgements = judging().standing
        items = {it.item.id: it.item for it in judgements if it.tiers is not None}
        scores = None
        if reward_model and items:
            with models.turn():  # loading a model draws random numbers
                scores = score_items(reward_model, list(items.values()))
        found = agreement(judgements, scores)
        rows = [([one, other], "", figures) for (one, other), figures in found.people.items()]
        rows += [([name], how or "model", figures) for (name, how), figures in found.model.items()]
        disputes = [
            {"prompt": visible(it.item.prompt.prompt)}
            | {"prefers": [(name, visible(answer)) for name, answer in it.prefers.items()]}
            for it in found.disputes
        ]
        told = {"items": found.items, "all": found.all, "rows": rows, "disputes": disputes}
        return told | {"alpha": found.alpha, "interval": found.alpha_interval}

    def ask(fields: Fields) -> Iterator[dict[str, Any]]:
        prompt, asked = prompt_of(fields), fields("models", list)
        chosen = [name for i, name in enumerate(talk_with) if i in asked]
        how = fields("preset", str), fields("settings", dict), fields("seed", int)
        return talk(models, chosen, prompt, *how, reward_model)

    def prefer(fields: Fields) -> dict[str, Any]:
        answers = fields("answers", list)
        if not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"found the answers {answers!r}, expected texts")
        how = fields("best", int), fields("seconds", float | int)
        judging().prefer(annotator_of(fields), prompt_of(fields), tuple(answers), *how)
        return {"kept": True}

    def rankings() -> Response:
        records, _ = ranking_records(judging().standing)
        attached = {"content-disposition": "attachment; filename=rankings.json"}
        return Response(f"{to_json(records, indent=2)}\n", 200, attached, "application/json")

    def runs() -> list[dict[str, Any]]:
        found = find_runs(outputs).values()
        return sorted((_shown(run, run.summary()) for run in found), key=lambda it: it["age"])

    def run_named(name: str) -> Any:
        found = find_runs(outputs).get(name)
        if found is None:
            raise UserError(f"there is no run {name!r} in {outputs}")
        return found

    def run(name: str) -> dict[str, Any]:
        found = run_named(name)
        return _shown(found, found.detail())

    def plot(name: str, key: str) -> Response:
        return Response(run_named(name).plot(key), media_type="image/svg+xml")

    def report(name: str) -> Response:
        path = run_named(name).report()
        if path is None:
            raise UserError(f"there is no report of {name!r}")
        return FileResponse(path, headers={"content-security-policy": REPORT})

    page = Path(str(files(__package__))) / "page"
    routes = [
        Route("/", lambda request: FileResponse(page / "index.html")),
        _get("/api/about", about),
        _post("/api/turn", turn),
        _post("/api/judge", judge),
        _post("/api/undo", undo),
        _get("/api/agreement", agree),
        _post("/api/talk", ask),
        _post("/api/prefer", prefer),
        _get("/rankings", rankings),
        _get("/api/runs", runs),
        _get("/api/run", run, "name"),
        _get("/plot", plot, "name", "key"),
        _get("/report", report, "name"),
        Mount("/page", StaticFiles(directory=page)),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS], www_redirect=False)
    return Starlette(routes=routes, middleware=[Middleware(_SaysPolicy), hosts, Middleware(OwnPage, port=port)])


class _SaysPolicy:
    """Puts the page's policy on every answer that has none of its own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                own = {b"content-security-policy": PAGE.encode(), b"x-content-type-options": b"nosniff"}
                own |= {b"referrer-policy": b"no-referrer", b"cache-control": b"no-store"}
                message["headers"] += [pair for pair in own.items() if pair[0] not in present]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(app_at: Callable[[int], Starlette], port: int) -> None:
    """Serve `app_at(port)` on this machine alone, until Ctrl-C; port 0 is a free one. Raises `UserError` if the port is
    taken."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOSTS[0], port))
            listening.listen()  # before it is said that one may come
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} can't be opened ({error}); take another by --port") from None
        port = listening.getsockname()[1]
        config = uvicorn.Config(app_at(port), log_level="warning", timeout_graceful_shutdown=2)
        print(f"http://{HOSTS[0]}:{port}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
            uvicorn.Server(config).run(sockets=[listening])


def _shown(run: RunFolder, fields: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a run; its `name`, by which it is asked for, as it is."""
    return all_visible(fields) | {"name": run.name, "shown": visible(run.name)}


class Fields:
    """Those of a request: `fields(name, type)` is one of that type. Raises `UserError` where it isn't."""

    def __init__(self, found: Any):
        if not isinstance(found, dict):
            raise UserError(f"found {found!r}, expected a JSON object")
        self._found = found

    def __call__(self, name: str, kind: Any, default: Any = None) -> Any:
        value = self._found.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"field '{name}': found {value!r}, expected {getattr(kind, '__name__', kind)}")
        return value


def _get(path: str, function: Callable[..., Any], *names: str) -> Route:
    return Route(path, _answered(lambda fields: function(*(fields(name, str) for name in names))))


def _post(path: str, function: Callable[[Fields], Any]) -> Route:
    return Route(path, _answered(function), methods=["POST"])


def _answered(function: Callable[[Fields], Any]) -> Callable[[Request], Any]:
    """An endpoint that sends as JSON what a function says to the fields of a request; a stream line by line."""

    async def answer(request: Request) -> Response:
        try:
            fields = Fields(_read(await request.body()) if request.method == "POST" else dict(request.query_params))
            found = await run_in_threadpool(function, fields)
        except UserError as error:
            return _json({"error": visible(str(error))}, 400)
        if isinstance(found, Iterator):
            return StreamingResponse(_lines(found), media_type="application/x-ndjson")
        return found if isinstance(found, Response) else _json(found)

    return answer


async def _lines(events: Any) -> AsyncIterator[str]:
    """Each event as a line of JSON, its `text` also as it is `shown`, until whoever reads them is gone."""
    try:
        async for event in iterate_in_threadpool(events):
            if event:
                yield json.dumps(event | {"shown": visible(event.get("text", ""))}) + "\n"
    finally:
        events.close()


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("found no JSON, expected a JSON object") from None


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")  # half a surrogate pair as its escape

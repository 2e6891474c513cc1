"""What the fields of a record are: a table of names, and a table of the shapes that they make together.

A name says what a field is: its role. The roles of a record make its shape: `SHAPES` has those that are read, and no
two rows of it claim the same roles. What is in neither table is refused, with the line that tells what it is: a column
with text is never left out unless a row of `NAMES` says that it is of no use.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

Kind = Literal["sft", "preference", "prompt", "kto"]
Role = str  # a key of `NAMES`

# Role → names of fields, in lower case; what is found is compared without case, with `_` for blanks and hyphens.
NAMES: dict[Role, str] = {
    "prompt": "prompt instruction question query q problem 질문 지시 지시문 명령 명령어 프롬프트 문제",
    "context": "input context passage 입력 문맥 지문",
    "history": "history",
    "system": "system system_prompt system_message 시스템",
    "messages": "messages conversations conversation dialogue dialog turns 대화",
    "text": "text",
    "completion": "completion output answer response a solution 답 답변 응답 대답 출력 정답",
    "completions": "completions responses candidates answers generations outputs",
    "instances": "instances",
    "chosen": "chosen chosen_response response_chosen accepted",
    "rejected": "rejected rejected_response response_rejected",
    "ranking": "ranking 순위",
    "ranks": "ranks",
    "scores": "scores ratings",
    "winner": "winner preference preferred",
    "label": "label kto_tag",
    "ignore": "id custom_id data_id idx index no uuid guid unnamed:_0 번호 순번 url link source data_source 출처 "
    "tokens token_count length num_turns turn llm model model_name model_a model_b judge language lang 언어 category "
    "subcategory 분류 카테고리 topic domain task task_type type dataset subset split date created_at updated_at "
    "timestamp author user_id conversation_id prompt_id question_id message_id row_id hash license metadata "
    "meta tags keywords difficulty level grade style chosen_model rejected_model chosen_rating rejected_rating "
    "score_chosen score_rejected chosen_score rejected_score score rating rank margin group file filename path "
    "version annotator judged_at",
}
# Roles that say which of several answers is the better one; and numbers that don't.
ORDERS = {"ranking", "ranks", "scores", "winner", "label"}
COUNTERS = {"id", "idx", "index", "no", "번호", "순번", "tokens", "token_count", "length", "num_turns", "turn", "count"}
COUNTERS |= {"answer_count", "data_id", "custom_id", "row_id", "timestamp", "version"}
# Of no use beside others: the label of ChatbotData's `Q,A,label` is a mood.
NO_USE_BESIDE = {"label": {"q", "a"}}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}

# `completion_0`, `response_b`, `answer01`: one of several answers; `score_a` likewise.
_NUMBERED = re.compile(
    r"(?:(completion|response|answer|output|candidate|conversation|답변|응답)|(score|rating))_?(\d{1,3}|[a-h])"
)

# Of a message, of one of several answers, or of an instance: what its keys are.
MESSAGE = {"role": "role from speaker", "content": "content value text contents utterance"}
CANDIDATE = {"completions": "text content contents response completion answer output", "scores": "score rating"}
CANDIDATE |= {"ranks": "rank"}
INSTANCE = {"context": "input", "completion": "output"}
_SPEAKERS = {"user": "user human usr prompter <사람> 사람 사용자 질문자"}
_SPEAKERS |= {"assistant": "assistant gpt bot chatgpt model <챗봇> 챗봇 답변자", "system": "system sys"}
SPEAKER = {name: role for role, names in _SPEAKERS.items() for name in names.split()}
# Tags of a dialogue in one text: user, assistant, system.
TAGS = (
    ("<usr>", "<bot>", "<sys>"),
    ("Human:", "Assistant:", "System:"),
    ("### Human:", "### Assistant:", "### System:"),
    ("### 질문:", "### 답변:", "### 시스템:"),
)


@dataclass(frozen=True)
class Shape:
    """One shape of a record: the roles that it needs, those that it may have, what it is for, and an example."""

    name: str
    needs: str
    may: str
    kind: Kind
    owners: str
    example: Mapping[str, Any]

    @cached_property
    def whole(self) -> bool:
        """Whether it is a dialogue and nothing beside it."""
        return self.needs in ("messages", "text")


_ASKED = "context history system"
SHAPES = (
    Shape(
        "prompt", "prompt", _ASKED, "prompt", "KoChatGPT's stage 3, any list of questions", {"prompt": "한국의 수도는?"}
    ),
    Shape(
        "exchange",
        "prompt completion",
        _ASKED,
        "sft",
        "KoChatGPT, KoAlpaca, KULLM, LLaMA-Factory; Korean CSV files",
        {"instruction": "다음을 요약해 줘.", "input": "긴 글", "output": "짧은 글"},
    ),
    Shape(
        "instances",
        "prompt instances",
        "system",
        "sft",
        "self-instruct, KoAlpaca's seed tasks: an example for each instance",
        {
            "instruction": "더해 줘.",
            "instances": [{"input": "1과 2", "output": "3"}, {"input": "2와 2", "output": "4"}],
        },
    ),
    Shape(
        "right answers",
        "prompt completions",
        _ASKED,
        "sft",
        "several answers without an order: an example for each",
        {"prompt": "인사해 줘.", "completion_0": "안녕하세요.", "completion_1": "반갑습니다."},
    ),
    Shape(
        "dialogue",
        "messages",
        "system",
        "sft",
        "OpenAI, TRL, ShareGPT, koVast; one that ends with the user's turn is a prompt",
        {"conversations": [{"from": "human", "value": "안녕"}, {"from": "gpt", "value": "안녕하세요."}]},
    ),
    Shape(
        "reply",
        "messages completion",
        "system",
        "sft",
        "judged answers",
        {"conversations": [{"from": "human", "value": "안녕"}], "response": "안녕하세요."},
    ),
    Shape(
        "tagged text",
        "text",
        "system",
        "sft",
        "open-korean-instructions: `<sys>` first is a system message, after `<usr>` more of the question",
        {"text": "<usr> 안녕 <bot> 안녕하세요."},
    ),
    Shape(
        "pair",
        "prompt chosen rejected",
        _ASKED,
        "preference",
        "ko_Ultrafeedback, orca-dpo-pairs; answers may be texts, messages, or whole dialogues",
        {"prompt": "한국의 수도는?", "chosen": "서울입니다.", "rejected": "몰라요."},
    ),
    Shape(
        "pair of dialogues",
        "chosen rejected",
        "system",
        "preference",
        "TRL's implicit prompt, HH-RLHF",
        {"chosen": "\n\nHuman: 안녕\n\nAssistant: 안녕하세요.", "rejected": "\n\nHuman: 안녕\n\nAssistant: 왜."},
    ),
    Shape(
        "pair after turns",
        "messages chosen rejected",
        "system",
        "preference",
        "LLaMA-Factory",
        {
            "conversations": [{"from": "human", "value": "안녕"}],
            "chosen": {"from": "gpt", "value": "안녕하세요."},
            "rejected": {"from": "gpt", "value": "왜."},
        },
    ),
    Shape(
        "dialogue and its rival",
        "messages rejected",
        "system",
        "preference",
        "ms-swift: the last turn is the chosen one",
        {
            "messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "안녕하세요."}],
            "rejected_response": "왜.",
        },
    ),
    Shape(
        "ranking",
        "prompt completions ranking",
        _ASKED,
        "preference",
        "KoChatGPT and its forks; AI Hub's",
        {"prompt": "안녕", "completion_0": "왜.", "completion_1": "안녕하세요.", "ranking": [1, 0]},
    ),
    Shape(
        "ranks",
        "prompt completions ranks",
        _ASKED,
        "preference",
        "the rank of each answer, 1 for the best",
        {"prompt": "안녕", "responses": [{"text": "왜.", "rank": 2}, {"text": "안녕하세요.", "rank": 1}]},
    ),
    Shape(
        "scores",
        "prompt completions scores",
        _ASKED,
        "preference",
        "UltraFeedback's kind; the higher the better",
        {"prompt": "안녕", "completions": ["왜.", "안녕하세요."], "scores": [2, 8.5]},
    ),
    Shape(
        "verdict",
        "prompt completions winner",
        _ASKED,
        "preference",
        "A/B tests",
        {"prompt": "안녕", "response_a": "왜.", "response_b": "안녕하세요.", "winner": "b"},
    ),
    Shape(
        "verdict on dialogues",
        "completions winner",
        "system",
        "preference",
        "arenas",
        {
            "conversation_a": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "왜."}],
            "conversation_b": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "안녕하세요."}],
            "winner": "model_b",
        },
    ),
    Shape(
        "labelled answer",
        "prompt completion label",
        _ASKED,
        "kto",
        "KTO, LLaMA-Factory's `kto_tag`: whether it is a good one",
        {"prompt": "안녕", "completion": "안녕하세요.", "label": True},
    ),
    Shape(
        "labelled dialogue",
        "messages label",
        "system",
        "kto",
        "ms-swift: the last turn is what the label is about",
        {
            "messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "안녕하세요."}],
            "label": True,
        },
    ),
    Shape(
        "labelled reply",
        "messages completion label",
        "system",
        "kto",
        "TRL",
        {"messages": [{"role": "user", "content": "안녕"}], "completion": "안녕하세요.", "label": False},
    ),
)


def plain(name: str) -> str:
    """`name` as the table has names."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def role_of(name: str) -> Role | None:
    """What a field of that name is; None if no row has it."""
    name = plain(name)
    if role := ROLES.get(name):
        return role
    match = _NUMBERED.fullmatch(name)
    return match and ("completions" if match[1] else "scores")


def number_of(name: str) -> tuple[str, str] | None:
    """The stem and the number of one of several: `response_a` → ("response", "a")."""
    match = None if plain(name) in ROLES else _NUMBERED.fullmatch(plain(name))
    return match and (match[1] or match[2], match[3])


def knows(names: Iterable[str]) -> bool:
    """Whether one of these fields is something that is read."""
    return any(role_of(name) not in (None, "ignore") for name in names)


@cache
def shape_of_roles(roles: frozenset[Role]) -> Shape | None:
    """The one shape that these roles make."""
    rows = (row for row in SHAPES if set(row.needs.split()) <= roles <= set(row.needs.split()) | set(row.may.split()))
    return next(rows, None)


@cache
def nearest(roles: frozenset[Role]) -> Shape | None:
    """The shape that a record with these roles lacks least of; None if it has a role that none would take."""
    taken = [row for row in SHAPES if roles and roles <= set(row.needs.split()) | set(row.may.split())]
    return min(taken, key=lambda row: len(set(row.needs.split()) - roles), default=None)


@cache
def out_of_place(roles: frozenset[Role]) -> tuple[Role, Shape] | None:
    """The one role that keeps these from making a shape, and the shape that the others make."""
    rows = ((role, shape_of_roles(roles - {role})) for role in NAMES if role in roles)
    return next(((role, shape) for role, shape in rows if shape), None)


def names_of(role: Role) -> str:
    """Some names of a role, for a message."""
    return ", ".join(NAMES[role].split()[:6])


def is_speaker(name: str) -> bool:
    return plain(name) in MESSAGE["role"].split()


def knows_answer(fields: Iterable[str]) -> bool:
    """Whether an object is an answer with its score or rank, and no message."""
    names = set(map(plain, fields))
    return bool(names & {*CANDIDATE["scores"].split(), *CANDIDATE["ranks"].split()}) and bool(
        names & set(CANDIDATE["completions"].split())
    )


def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    """A tag in angle brackets stands anywhere, one that is a word at the start of a line."""
    return re.compile("|".join(re.escape(tag) if tag.startswith("<") else rf"(?:^|\n){re.escape(tag)}" for tag in tags))


_TAGS = [(_pattern(tags), tags) for tags in TAGS]
_BEGINS = re.compile(r"\s*<(?:usr|sys)>|\n\n(?:### )?(?:Human|System|질문|시스템):")
# The first and the last character of such a text: few texts have them, and there may be millions.
MAY_BEGIN, MAY_END = set("< \t\r\n"), set(">: \t\r\n")
_WAITS = tuple(assistant for _, assistant, _ in TAGS)


def is_dialogue(text: str) -> bool:
    """Whether a text that need not be a dialogue is one: it begins as those do, or ends in the tag of its answer."""
    if text[:1] in MAY_BEGIN and _BEGINS.match(text):
        return True
    return text[-1:] in MAY_END and text.rstrip().endswith(_WAITS) and len(tagged_spans(text)) > 1


def tagged_spans(text: str) -> list[tuple[str, int, int]]:
    """Who speaks from where to where in a dialogue that is one text; empty if it has no tags, or text before them.

    Of a text that begins with a blank line, as HH-RLHF's do, a tag has one before it: what else looks like one is said.
    """
    for pattern, tags in _TAGS:
        places = [*pattern.finditer(text)]
        if places and text.startswith("\n\n") and places[0].start() == 1:
            places = [place for place in places if text[place.start() - 1 : place.start() + 1] == "\n\n"]
        if places and not text[: places[0].start()].strip():
            ends = [*(place.start() for place in places[1:]), len(text)]
            roles = dict(zip(tags, ("user", "assistant", "system"), strict=True))
            return [(roles[place[0].strip()], place.end(), end) for place, end in zip(places, ends, strict=True)]
    return []


def alike(name: str) -> Role | None:
    """What a field that no row has may be meant as, by its spelling."""
    names = [known for known in ROLES if len(known) > 2]
    match = difflib.get_close_matches(plain(name), names, n=1, cutoff=0.75)
    return ROLES[match[0]] if match else None

"""Shapes of records that people have, made up: whose it is, two records or so, and what they must be read as."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.layout import RawRecord, is_text, shown
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking
from kochat_trl.desk.curation.finders import contents_of

USER, BOT = "안녕?", "반가워요."
TURNS = ("안녕?", "반가워요.", "잘 지내?", "네, 잘 지내요.")
SYSTEM = "친절하게 답해."
PAIR = ((0,), (1,))  # the tiers of chosen, rejected
END = "<|endoftext|>"


def strings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The strings in a record that say something, and where they are."""
    if isinstance(value, str) and is_text(value):
        yield path, value
    inner = (
        value.items()
        if isinstance(value, dict)
        else (("[]", item) for item in value)
        if isinstance(value, list)
        else ()
    )
    for name, item in inner:
        yield from strings(item, (*path, name))


def unaccounted(raw: RawRecord, records: Sequence[Any]) -> list[tuple[str, str]]:
    """The texts of a record that `records`, which it was read as, don't have, and that aren't named as not read.

    Speakers and verdicts are no texts, and a field that only repeats others is none of its own.
    """
    read = [text for record in records for text in (*contents_of(record), record.system or "")]
    plan = raw.layout.plan(raw.known_fields())
    for_order = {path[0] for role in ("winner", "label", "ranking") for path in plan.paths.get(role, ())}
    repeats = {path[0] for role in plan.repeats for path in plan.paths[role]}
    missing = []
    for path, text in strings(raw.known_fields()):
        spans = [text[start:end].strip() for _, start, end in shapes.tagged_spans(text)] or [text]
        told = path[0] in for_order | repeats or shapes.is_speaker(path[-1]) or path[-1] == "type"
        named = any(shown(path[:i]) in raw.layout.passed_over for i in range(1, len(path) + 1))
        if not told and not named and not all(any(span in its for its in read) for span in spans):
            missing.append((shown(path), text))
    return missing


@dataclass(frozen=True)
class Foreign:
    """`records` as the file has them, and the `kind` and values that they must be read as, under `options`."""

    records: list[dict[str, Any]]
    kind: Any
    expected: list[Any]
    options: ReadingOptions = field(default_factory=ReadingOptions)


def sharegpt(
    *texts: str, speakers: tuple[str, str] = ("human", "gpt"), keys: tuple[str, str] = ("from", "value")
) -> Any:
    return [{keys[0]: speakers[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def openai(*texts: str, system: str | None = None) -> Any:
    turns = sharegpt(*texts, speakers=("user", "assistant"), keys=("role", "content"))
    return ([{"role": "system", "content": system}] if system else []) + turns


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


ONE = [Dialogue((USER, BOT))]
PAIRS = [Ranking(USER, (BOT, "왜?"), PAIR)]
RANKED = Ranking("뭐?", ("가", "나", "다"), ((2,), (0,), (1,)), ranking=[2, 0, 1])
THREE = {"prompt": "뭐?", "completion_0": "가", "completion_1": "나", "completion_2": "다"}

FOREIGN: dict[str, Foreign] = {
    # --- SFT, flat ---
    "KoAlpaca": Foreign([{"instruction": USER, "output": BOT, "url": "https://a.kr/1"}], "sft", ONE),
    "KULLM": Foreign(
        [
            {"id": "kullm_1", "instruction": "요약해 줘.", "input": "긴 글", "output": "짧은 글"},
            {"id": "kullm_2", "instruction": USER, "input": "", "output": BOT},
        ],
        "sft",
        [Dialogue(("요약해 줘.\n\n긴 글", "짧은 글")), *ONE],
    ),
    "OpenOrca": Foreign(
        [{"id": "t0.1", "system_prompt": SYSTEM, "question": USER, "response": BOT}],
        "sft",
        [Dialogue((USER, BOT), SYSTEM)],
    ),
    "question and answer": Foreign([{"custom_id": 3, "question": USER, "answer": BOT}], "sft", ONE),
    "query and response": Foreign([{"query": USER, "response": BOT}], "sft", ONE),
    "prompt and response": Foreign([{"prompt": USER, "response": BOT}], "sft", ONE),
    "input and output": Foreign([{"input": USER, "output": BOT}], "sft", ONE),
    "Korean headers": Foreign([{"번호": "1", "질문": USER, "답변": BOT}], "sft", ONE),
    "a passage": Foreign(
        [{"question": "누구?", "context": "철수가 간다.", "answer": "철수"}],
        "sft",
        [Dialogue(("누구?\n\n철수가 간다.", "철수"))],
    ),
    "a fork of KoChatGPT, with the text to sum up": Foreign(
        [{"prompt": "요약", "input": "철수: 어디야?\n영희: 집.", "completion": "영희는 집에 있다."}],
        "sft",
        [Dialogue(("요약\n\n철수: 어디야?\n영희: 집.", "영희는 집에 있다."))],
    ),
    "a fork of KoChatGPT, with several right answers": Foreign(
        [{"prompt": USER, "completion_0": BOT, "completion_1": "어서 와요."}, {"prompt": USER, "completion_0": BOT}],
        "sft",
        [Dialogue((USER, BOT)), Dialogue((USER, "어서 와요.")), Dialogue((USER, BOT))],
    ),
    "self-instruct": Foreign(
        [
            {
                "id": "seed_task_0",
                "name": "sum",
                "instruction": "더해 줘.",
                "instances": [{"input": "1, 2", "output": "3"}, {"input": "", "output": "4"}],
                "is_classification": False,
            }
        ],
        "sft",
        [Dialogue(("더해 줘.\n\n1, 2", "3")), Dialogue(("더해 줘.", "4"))],
        ReadingOptions(columns={"name": "ignore"}),
    ),
    "LLaMA-Factory's Alpaca": Foreign(
        [{"instruction": TURNS[2], "input": "", "output": TURNS[3], "system": SYSTEM, "history": [list(TURNS[:2])]}],
        "sft",
        [Dialogue(TURNS, SYSTEM)],
    ),
    "Alpaca with the whole text": Foreign(
        [
            {
                "instruction": USER,
                "input": "",
                "output": BOT,
                "text": f"### Instruction:\n{USER}\n\n### Response:\n{BOT}",
            }
        ],
        "sft",
        ONE,
    ),
    "ChatbotData": Foreign([{"Q": USER, "A": BOT, "label": "0"}], "sft", ONE),
    # --- SFT, dialogues ---
    "OpenAI": Foreign([{"messages": openai(*TURNS, system=SYSTEM)}], "sft", [Dialogue(TURNS, SYSTEM)]),
    "OpenAI's content parts": Foreign(
        [{"messages": [{"role": "user", "content": parts(USER)}, {"role": "assistant", "content": parts(BOT)}]}],
        "sft",
        ONE,
    ),
    "messages beside the prompt": Foreign(
        [{"prompt": USER, "prompt_id": "a1", "messages": openai(*TURNS)}], "sft", [Dialogue(TURNS)]
    ),
    "TRL, prompt and completion as messages": Foreign(
        [{"prompt": openai(*TURNS[:3], system=SYSTEM), "completion": openai("", TURNS[3])[1:]}],
        "sft",
        [Dialogue(TURNS, SYSTEM)],
    ),
    "ShareGPT": Foreign([{"id": "x_0", "conversations": sharegpt(*TURNS)}], "sft", [Dialogue(TURNS)]),
    "ShareGPT with a system turn": Foreign(
        [{"conversations": [{"from": "system", "value": SYSTEM}, *sharegpt(USER, BOT)]}],
        "sft",
        [Dialogue((USER, BOT), SYSTEM)],
    ),
    "ShareGPT with roles": Foreign([{"conversations": openai(*TURNS)}], "sft", [Dialogue(TURNS)]),
    "open-korean-instructions": Foreign(
        [
            {"source": "a", "text": f"<usr> {TURNS[0]} <bot> {TURNS[1]} <usr> {TURNS[2]} <bot> {TURNS[3]}"},
            {"source": "b", "text": f"<sys> {SYSTEM} <usr> {USER} <bot> {BOT}"},
            {"source": "c", "text": f"<usr> 요약해 줘. <sys> 긴 글 <bot> {BOT}"},
        ],
        "sft",
        [Dialogue(TURNS), Dialogue((USER, BOT), SYSTEM), Dialogue(("요약해 줘.\n\n긴 글", BOT))],
    ),
    "judged answers": Foreign(
        [{"conversations": sharegpt(*TURNS[:3]), "response": TURNS[3]}], "sft", [Dialogue(TURNS)]
    ),
    # --- Preference ---
    "ko_Ultrafeedback": Foreign([{"prompt": USER, "chosen": BOT, "rejected": "왜?"}], "preference", PAIRS),
    "whooray's": Foreign(
        [{"instruction": USER, "chosen_response": BOT, "rejected_response": "왜?"}], "preference", PAIRS
    ),
    "the English UltraFeedback": Foreign(
        [
            {
                "prompt": USER,
                "prompt_id": "9f",
                "chosen": openai(USER, BOT),
                "rejected": openai(USER, "왜?"),
                "messages": openai(USER, BOT),
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
        ],
        "preference",
        PAIRS,
    ),
    "orca-dpo-pairs": Foreign(
        [{"system": SYSTEM, "question": USER, "chosen": BOT, "rejected": "왜?"}],
        "preference",
        [Ranking(USER, (BOT, "왜?"), PAIR, SYSTEM)],
    ),
    "TRL, implicit prompt": Foreign(
        [{"chosen": openai(*TURNS), "rejected": openai(*TURNS[:3], "몰라.")}],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, None, TURNS[:2])],
    ),
    "HH-RLHF": Foreign(
        [{"chosen": hh(*TURNS), "rejected": hh(*TURNS[:3], "몰라.")}],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, None, TURNS[:2])],
    ),
    "several turns before the choice": Foreign(
        [
            {
                "prompt": openai(*TURNS[:3], system=SYSTEM),
                "chosen": openai("", TURNS[3])[1:],
                "rejected": {"role": "assistant", "content": "몰라."},
            }
        ],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, SYSTEM, TURNS[:2])],
    ),
    "LLaMA-Factory's pairs": Foreign(
        [{"instruction": "요약해 줘.", "input": "긴 글", "chosen": "짧은 글", "rejected": "글"}],
        "preference",
        [Ranking("요약해 줘.\n\n긴 글", ("짧은 글", "글"), PAIR)],
    ),
    "LLaMA-Factory's ShareGPT pairs": Foreign(
        [
            {
                "conversations": sharegpt(*TURNS[:3]),
                "chosen": {"from": "gpt", "value": TURNS[3]},
                "rejected": {"from": "gpt", "value": "몰라."},
            }
        ],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, None, TURNS[:2])],
    ),
    "ms-swift": Foreign(
        [{"messages": openai(*TURNS, system=SYSTEM), "rejected_response": "몰라."}],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, SYSTEM, TURNS[:2])],
    ),
    "RLHF-Korean-Friendly-LLM": Foreign(
        [{"id": 1, "prompt": USER, "chosen": f"{BOT}{END}", "rejected": f"왜?{END}"}],
        "preference",
        [Ranking(USER, (f"{BOT}{END}", f"왜?{END}"), PAIR)],
    ),
    "rankings as texts": Foreign(
        [THREE | {"ranking": "2,0,1"}, THREE | {"ranking": ["2", "0", "1"]}], "preference", [RANKED, RANKED]
    ),
    "rankings from 1": Foreign([THREE | {"ranking": [3, 1, 2]}], "preference", [RANKED]),
    "scores": Foreign(
        [{"prompt": "뭐?", "completions": ["가", "나", "다"], "scores": [5, 2.5, 9]}],
        "preference",
        [Ranking("뭐?", ("가", "나", "다"), ((2,), (0,), (1,)))],
    ),
    "objects with a score": Foreign(
        [
            {
                "prompt": "뭐?",
                "responses": [
                    {"text": "가", "score": 1, "model": "a"},
                    {"text": "나", "score": 1, "model": "b"},
                    {"text": "다", "score": 4, "model": "c"},
                ],
            }
        ],
        "preference",
        [Ranking("뭐?", ("가", "나", "다"), ((2,), (0, 1)))],
    ),
    "objects with a rank": Foreign(
        [{"prompt": "뭐?", "candidates": [{"content": "가", "rank": 2}, {"content": "나", "rank": 1}]}],
        "preference",
        [Ranking("뭐?", ("가", "나"), ((1,), (0,)))],
    ),
    "A/B with a verdict": Foreign(
        [{"prompt": "뭐?", "response_a": "가", "response_b": "나", "winner": winner} for winner in ("A", "response_b")],
        "preference",
        [Ranking("뭐?", ("가", "나"), PAIR), Ranking("뭐?", ("가", "나"), ((1,), (0,)))],
    ),
    "an arena": Foreign(
        [
            {
                "question_id": "q1",
                "model_a": "kogpt2",
                "model_b": "polyglot",
                "winner": "model_b",
                "conversation_a": openai(*TURNS[:3], "몰라."),
                "conversation_b": openai(*TURNS),
                "language": "Korean",
            }
        ],
        "preference",
        [Ranking(TURNS[2], ("몰라.", TURNS[3]), ((1,), (0,)), None, TURNS[:2])],
    ),
    "AI Hub": Foreign(
        [
            {
                "data_id": "1",
                "question": "뭐?",
                "answer01": {"contents": "가", "answer_count": 1},
                "answer02": {"contents": "나", "answer_count": 1},
                "ranking": [2, 1],
            }
        ],
        "preference",
        [Ranking("뭐?", ("가", "나"), ((1,), (0,)), ranking=[1, 0])],
        ReadingOptions(columns={"data_id": "ignore"}),
    ),
    "HH-RLHF with its prompt apart": Foreign(
        [
            {
                "prompt": f"\n\nHuman: {USER}\n\nAssistant: {BOT}\n\nHuman: {TURNS[2]}\n\nAssistant:",
                "chosen": TURNS[3],
                "rejected": "Human: 몰라.\nAssistant: 나도.",
            }
        ],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "Human: 몰라.\nAssistant: 나도."), PAIR, None, TURNS[:2])],
    ),
    "HH-RLHF with a script in a turn": Foreign(
        [
            {
                "chosen": "\n\nHuman: 대본:\nHuman: 가\nAssistant: 나\n\nAssistant: 네.",
                "rejected": "\n\nHuman: 대본:\nHuman: 가\nAssistant: 나\n\nAssistant: 왜?",
            }
        ],
        "preference",
        [Ranking("대본:\nHuman: 가\nAssistant: 나", ("네.", "왜?"), PAIR)],
    ),
    "a prompt and dialogues with tags": Foreign(
        [{"prompt": USER, "chosen": f"<usr> {USER} <bot> {BOT}", "rejected": f"<usr> {USER} <bot> 왜?"}],
        "preference",
        [Ranking(USER, (BOT, "왜?"), PAIR)],
    ),
    "a prompt that waits": Foreign([{"prompt": f"Human: {USER}\nAssistant:", "completion": BOT}], "sft", ONE),
    "tags in both": Foreign([{"prompt": f"<usr> {USER} <bot>", "completion": BOT}], "sft", ONE),
    "scores of a table": Foreign(
        [
            {
                "prompt": USER,
                "response_a": BOT,
                "response_b": "왜?",
                "response_c": "네.",
                "score_a": "3.5",
                "score_b": "10",
            }
            | {"score_c": " "}
        ],
        "preference",
        [Ranking(USER, (BOT, "왜?", "네."), ((1,), (0,)))],
    ),
    "ranks of a table with gaps": Foreign(
        [{"prompt": USER, "completions": [BOT, "왜?", "네."], "ranks": [1.0, None, 2.0]}],
        "preference",
        [Ranking(USER, (BOT, "왜?", "네."), ((0,), (2,)))],
    ),
    "a verdict on a list": Foreign(
        [{"prompt": USER, "responses": ["왜?", BOT], "winner": "model_b"}],
        "preference",
        [Ranking(USER, ("왜?", BOT), ((1,), (0,)))],
    ),
    # --- KTO ---
    "KTO": Foreign(
        [{"prompt": USER, "completion": BOT, "label": True}, {"prompt": USER, "completion": "왜?", "label": False}],
        "kto",
        [Labelled(USER, BOT, True), Labelled(USER, "왜?", False)],
    ),
    "TRL's KTO in messages": Foreign(
        [{"prompt": openai(*TURNS[:3]), "completion": openai("", TURNS[3])[1:], "label": False}],
        "kto",
        [Labelled(TURNS[2], TURNS[3], False, None, TURNS[:2])],
    ),
    "ms-swift's KTO": Foreign(
        [{"messages": openai(*TURNS, system=SYSTEM), "label": True}],
        "kto",
        [Labelled(TURNS[2], TURNS[3], True, SYSTEM, TURNS[:2])],
    ),
    "LLaMA-Factory's KTO": Foreign(
        [{"instruction": USER, "input": "", "output": BOT, "kto_tag": "true"}], "kto", [Labelled(USER, BOT, True)]
    ),
    # --- Prompts ---
    "a list of questions": Foreign([{"id": 1, "question": USER}], "prompt", [Prompt(USER)]),
    "prompts as messages": Foreign(
        [{"prompt": openai(*TURNS[:3], system=SYSTEM)}, {"messages": openai(USER)}],
        "prompt",
        [Prompt(TURNS[2], SYSTEM, TURNS[:2]), Prompt(USER)],
    ),
    # --- Said by `columns:` ---
    "columns that are named": Foreign(
        [{"고객 발화": USER, "상담사 발화": BOT, "비고": "없음"}],
        "sft",
        ONE,
        ReadingOptions(columns={"고객 발화": "prompt", "상담사 발화": "completion", "비고": "ignore"}),
    ),
    "more in an answer of a list": Foreign(
        [
            {
                "prompt": USER,
                "responses": [{"text": BOT, "why": "좋다"}, {"text": "왜?", "why": "나쁘다"}],
                "winner": "a",
            }
        ],
        "preference",
        [Ranking(USER, (BOT, "왜?"), PAIR)],
        ReadingOptions(columns={"responses[].why": "ignore"}),
    ),
    "columns in columns": Foreign(
        [{"qa": {"q": {"contents": USER}, "a": {"contents": BOT}}}],
        "sft",
        ONE,
        ReadingOptions(columns={"qa.q.contents": "prompt", "qa.a.contents": "completion"}),
    ),
    "numbers that stand in another order than their answers": Foreign(
        [{"q": USER, "A1": {"t": BOT}, "A2": {"t": "왜?"}, "2위 여부": 2, "1위 여부": 1}],
        "preference",
        [Ranking(USER, (BOT, "왜?"), PAIR)],
        ReadingOptions(
            columns={"A1.t": "completions", "A2.t": "completions", "1위 여부": "ranks", "2위 여부": "ranks"}
        ),
    ),
    "columns in lists": Foreign(
        [{"title": "인사", "qas": [{"q": USER, "a": BOT}, {"q": "뭐?", "a": "가"}]}],
        "sft",
        [*ONE, Dialogue(("뭐?", "가"))],
        ReadingOptions(columns={"qas[].q": "prompt", "qas[].a": "completion", "title": "ignore"}),
    ),
}

"""The datasets of docs/data.md: records made up in the shape of each, and what they must be read as."""

from typing import Any

from kochat_trl.data.records import Dialogue, Labelled, Ranking
from tests.data.foreign import BOT, ONE, PAIR, PAIRS, SYSTEM, TURNS, USER, hh, openai, sharegpt

MORE = {"question": "뭐?", "answer": "가"}
TWO = [*ONE, Dialogue(("뭐?", "가"))]
SUMMED_UP = Dialogue(("요약해 줘.\n\n긴 글", "짧은 글"))
ALPACA = [
    {"instruction": "요약해 줘.", "input": "긴 글", "output": "짧은 글"},
    {"instruction": USER, "input": "", "output": BOT},
]
UNDER_SYSTEM = [Ranking(USER, (BOT, "왜?"), PAIR, SYSTEM), Ranking("뭐?", ("가", "나"), PAIR)]
ORCA_PAIRS = [
    {"system": SYSTEM, "question": USER, "chosen": BOT, "rejected": "왜?"},
    {"system": "", "question": "뭐?", "chosen": "가", "rejected": "나"},
]


def chosen(prompt: str, good: str, bad: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": openai(prompt, good), "rejected": openai(prompt, bad)}


# Name → records, the kind that they are for, and the records that they are.
DATASETS: dict[str, tuple[list[dict[str, Any]], str, list[Any]]] = {
    "beomi/KoAlpaca-v1.1a": (
        [
            {"instruction": USER, "output": BOT, "url": "https://a.kr/1"},
            {"instruction": "뭐?", "output": "가", "url": ""},
        ],
        "sft",
        TWO,
    ),
    "beomi/KoAlpaca-RealQA": (
        [{"custom_id": "1", "question": USER, "answer": BOT}, MORE | {"custom_id": "2"}],
        "sft",
        TWO,
    ),
    "nlpai-lab/kullm-v2": ([{"id": f"a_{i}"} | record for i, record in enumerate(ALPACA)], "sft", [SUMMED_UP, *ONE]),
    "nlpai-lab/databricks-dolly-15k-ko": (
        [
            {"instruction": "요약해 줘.", "context": "긴 글", "response": "짧은 글", "category": "summarization"},
            {"instruction": USER, "context": "", "response": BOT, "category": "open_qa"},
        ],
        "sft",
        [SUMMED_UP, *ONE],
    ),
    "nlpai-lab/openassistant-guanaco-ko": (
        [
            {"id": "a", "text": f"### Human: {USER}\n### Assistant: {BOT}"},
            {
                "id": "b",
                "text": "### Human: " + "\n### Human: ".join(["뭐?\n### Assistant: 가", "또?\n### Assistant: 나"]),
            },
        ],
        "sft",
        [*ONE, Dialogue(("뭐?", "가", "또?", "나"))],
    ),
    "squarelike/OpenOrca-gugugo-ko": (
        [
            {"id": "flan.1", "system_prompt": SYSTEM, "question": USER, "response": BOT},
            {"id": "flan.2", "system_prompt": "", "question": "뭐?", "response": "가"},
        ],
        "sft",
        [Dialogue((USER, BOT), SYSTEM), Dialogue(("뭐?", "가"))],
    ),
    "kyujinpy/OpenOrca-KO": ([{"id": "t0"} | record for record in ALPACA], "sft", [SUMMED_UP, *ONE]),
    "kyujinpy/KOpen-platypus": (
        [record | {"data_source": "MATH/PRM-800K"} for record in ALPACA],
        "sft",
        [SUMMED_UP, *ONE],
    ),
    "Bingsu/ko_alpaca_data": (ALPACA, "sft", [SUMMED_UP, *ONE]),
    "jojo0217/korean_rlhf_dataset": (ALPACA, "sft", [SUMMED_UP, *ONE]),
    "maywell/ko_wikidata_QA": (
        [{"instruction": USER, "output": BOT}, {"instruction": "뭐?", "output": "가"}],
        "sft",
        TWO,
    ),
    "CarrotAI/ko-instruction-dataset": (
        [{"instruction": USER, "output": BOT}, {"instruction": "뭐?", "output": "가"}],
        "sft",
        TWO,
    ),
    "kuotient/orca-math-word-problems-193k-korean": ([{"question": USER, "answer": BOT}, MORE], "sft", TWO),
    "maywell/koVast": (
        [{"conversations": sharegpt(*TURNS)}, {"conversations": sharegpt(USER, BOT)}],
        "sft",
        [Dialogue(TURNS), *ONE],
    ),
    "changpt/ko-lima-vicuna": (
        [{"id": "1", "conversations": sharegpt(*TURNS)}, {"id": "2", "conversations": sharegpt(USER, BOT)}],
        "sft",
        [Dialogue(TURNS), *ONE],
    ),
    "FreedomIntelligence/evol-instruct-korean": (
        [{"id": "1", "conversations": sharegpt(*TURNS)}, {"id": "2", "conversations": sharegpt(USER, BOT)}],
        "sft",
        [Dialogue(TURNS), *ONE],
    ),
    "FreedomIntelligence/alpaca-gpt4-korean": (
        [{"id": "1", "conversations": sharegpt("뭐?", "가")}, {"id": "2", "conversations": sharegpt(USER, BOT)}],
        "sft",
        TWO[::-1],
    ),
    "heegyu/open-korean-instructions": (
        [
            {"source": "koalpaca-v1.0", "text": f"<usr> {USER}\n<bot> {BOT}"},
            {"source": "kullm", "text": "<usr> 요약해 줘. <sys> 긴 글 <bot> 짧은 글"},
        ],
        "sft",
        [*ONE, SUMMED_UP],
    ),
    "DreamingBumblebee/ultrachat-100-ko:train_sft": (
        [
            {"prompt": USER, "prompt_id": "a", "messages": openai(*TURNS)},
            {"prompt": USER, "prompt_id": "b", "messages": openai(USER, BOT)},
        ],
        "sft",
        [Dialogue(TURNS), *ONE],
    ),
    "mirlab/aka-llama-korean-dataset-multiturn-raw": (
        [
            {
                "messages": [message | {"source": "gpt"} for message in openai(*turns)],
                "data_id": "1",
                "index": 3,
                "prompt_id": "p",
                "source": "s",
                "url": "https://a.kr",
            }
            for turns in (TURNS, (USER, BOT))
        ],
        "sft",
        [Dialogue(TURNS), *ONE],
    ),
    "songys/Chatbot_data": ([{"Q": USER, "A": BOT, "label": "0"}, {"Q": "뭐?", "A": "가", "label": "2"}], "sft", TWO),
    "maywell/ko_Ultrafeedback_binarized": (
        [{"prompt": USER, "chosen": BOT, "rejected": "왜?"}, {"prompt": "뭐?", "chosen": "가", "rejected": "나"}],
        "preference",
        [*PAIRS, Ranking("뭐?", ("가", "나"), PAIR)],
    ),
    "whooray/ko_Ultrafeedback_binarized": (
        [
            {"instruction": USER, "chosen_response": BOT, "rejected_response": "왜?"},
            {"instruction": "뭐?", "chosen_response": "가", "rejected_response": "나"},
        ],
        "preference",
        [*PAIRS, Ranking("뭐?", ("가", "나"), PAIR)],
    ),
    "kuotient/orca-math-korean-dpo-pairs": (ORCA_PAIRS, "preference", UNDER_SYSTEM),
    "SJ-Donald/orca-dpo-pairs-ko": (ORCA_PAIRS, "preference", UNDER_SYSTEM),
    "kuotient/orca-math-korean-preference": (
        [
            {
                "llm": "a",
                "question": question,
                "answer": "풀이",
                "question_en": "What?",
                "answer_en": "So.",
                "generated": "풀이 2",
                "label": True,
                "chosen": good,
                "rejected": bad,
            }
            for question, good, bad in ((USER, BOT, "왜?"), ("뭐?", "가", "나"))
        ],
        "preference",
        [*PAIRS, Ranking("뭐?", ("가", "나"), PAIR)],
    ),
    "heegyu/hh-rlhf-ko": (
        [
            {
                "context": sharegpt(*TURNS[:2]),
                "instruction": {"from": "human", "value": TURNS[2]},
                "chosen": {"from": "gpt", "value": TURNS[3]},
                "rejected": {"from": "gpt", "value": "몰라."},
            },
            {"context": [], "instruction": {"value": USER}, "chosen": {"value": BOT}, "rejected": {"value": "왜?"}},
        ],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, None, TURNS[:2]), *PAIRS],
    ),
    "Anthropic/hh-rlhf": (
        [
            {"chosen": hh(*TURNS), "rejected": hh(*TURNS[:3], "몰라.")},
            {"chosen": hh(USER, BOT), "rejected": hh(USER, "왜?")},
        ],
        "preference",
        [Ranking(TURNS[2], (TURNS[3], "몰라."), PAIR, None, TURNS[:2]), *PAIRS],
    ),
    "HuggingFaceH4/ultrafeedback_binarized:train_prefs": (
        [
            chosen(prompt, good, bad)
            | {"prompt_id": "a", "messages": openai(prompt, good), "score_chosen": 8.0, "score_rejected": 2.5}
            for prompt, good, bad in ((USER, BOT, "왜?"), ("뭐?", "가", "나"))
        ],
        "preference",
        [*PAIRS, Ranking("뭐?", ("가", "나"), PAIR)],
    ),
    "trl-lib/kto-mix-14k": (
        [
            {"prompt": openai(*TURNS[:3]), "completion": openai("", TURNS[3])[1:], "label": True},
            {"prompt": openai(USER), "completion": openai("", "왜?")[1:], "label": False},
        ],
        "kto",
        [Labelled(TURNS[2], TURNS[3], True, None, TURNS[:2]), Labelled(USER, "왜?", False)],
    ),
}

from kochat_trl.data.records import Dialogue, Prompt, Ranking
from kochat_trl.desk.curation.convert import text_rows
from kochat_trl.models.template import render
from kochat_trl.settings.keys import DataArguments


def test_text_rows_are_trls_formats(tiny_tokenizer):
    options = DataArguments(rank_margins=True)
    ranking = Ranking("가", ("나", "다"), ((1,), (0,)))
    chat = Dialogue(("가", "나", "다", "라"))
    assert list(text_rows(Prompt("가"), 0, options)) == [{"prompt": "가"}]
    assert list(text_rows(Dialogue(("가", "나")), 0, options)) == [{"prompt": "가", "completion": "나"}]
    assert list(text_rows(chat, 0, options)) == [{"messages": list(chat.messages)}]
    row = {"prompt": "가", "chosen": "다", "rejected": "나", "margin": 1.0, "group": 7}
    assert list(text_rows(ranking, 7, options)) == [row]

    prompt_text = "### Instruction(명령어):\n가\n\n### Response(응답):"
    assert list(text_rows(Prompt("가"), 0, options, tiny_tokenizer)) == [{"prompt": prompt_text}]
    assert list(text_rows(ranking, 7, options, tiny_tokenizer)) == [
        {"prompt": prompt_text, "chosen": "다</s>", "rejected": "나</s>", "margin": 1.0, "group": 7}
    ]
    assert list(text_rows(Dialogue(("가", "나")), 0, options, tiny_tokenizer)) == [
        {"prompt": prompt_text, "completion": "나</s>"}
    ]
    assert list(text_rows(chat, 0, options, tiny_tokenizer)) == [{"text": render(tiny_tokenizer, chat.messages)}]

"""Texts and chats in JSON Lines, JSON and datasets; what is neither is refused, and what was found is named."""

import json

import pytest

from models import byte_tokenizer
from spinquant import TextError, load_text
from spinquant.calibration import chats

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WRITTEN = "<user>Hi</user><assistant>Hello</assistant>"
FORMS = {
    "messages": {"messages": MESSAGES},
    "conversations with roles": {"conversations": MESSAGES},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello"},
    "prompt and completion of messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "a list": MESSAGES,
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, MESSAGES[1]]},
    "keys without values": {"id": 3, "messages": [{**m, "tool_calls": None, "name": None} for m in MESSAGES]},
    "columns": {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
}


def chatting():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_chats_are_written_by_the_chat_template(form, tmp_path):
    name, text = load_text(lines(tmp_path / "chat.jsonl", FORMS[form], FORMS[form]), chatting())
    assert (name, text) == ("chat.jsonl", 2 * WRITTEN)
    (tmp_path / "chat.json").write_text(json.dumps([FORMS[form]]))
    assert load_text(str(tmp_path / "chat.json"), chatting())[1] == WRITTEN


def test_rows_of_texts_are_texts(tmp_path):
    path = lines(tmp_path / "texts.jsonl", {"text": "one\u2028line", "id": 1}, {"text": "two"})
    assert load_text(path)[1] == "one\u2028line\n\ntwo"
    assert load_text(lines(tmp_path / "plain.ndjson", "one", "two"))[1] == "one\n\ntwo"
    (tmp_path / "unescaped.jsonl").write_text('\ufeff{"text": "one\u2028line"}\r\n\r\n', encoding="utf-8")
    assert load_text(str(tmp_path / "unescaped.jsonl"))[1] == "one\u2028line"


REFUSED = {
    "other keys": ({"question": "a", "answer": "b"}, r"line 2 .*'answer', 'question': expected text, messages"),
    "a number": (7, r"line 2 .*a JSON int"),
    "a text that is none": ({"text": ["a"]}, r"text of line 2 .*a JSON list"),
    "no messages": ({"messages": []}, r"line 2 .*a JSON list.*list of messages"),
    "messages as text": ({"messages": "Hi"}, r"line 2 .*a text as its messages"),
    "a speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, r"line 2 .*from 'narrator'.*human"),
    "no role": ({"messages": [{"content": "x"}]}, r"line 2 .*expected a role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"line 2 .*'image'.*text alone"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, r"line 2 .*nothing as its content"),
    "a role of none": (
        {"messages": [{"role": "critic", "content": "x"}]},
        r"cannot write line 2 .*no such role",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_neither_is_refused(what, tmp_path):
    row, reason = REFUSED[what]
    with pytest.raises(TextError, match=reason):
        load_text(lines(tmp_path / "rows.jsonl", {"messages": MESSAGES}, row), chatting())


def test_what_is_not_json_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TextError, match=r"line 2 .*is not JSON"):
        load_text(str(tmp_path / "bad.jsonl"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(TextError, match="is not JSON"):
        load_text(str(tmp_path / "deep.json"))
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(TextError, match="no rows"):
            load_text(str(tmp_path / "empty.jsonl"))
    with pytest.raises(TextError, match="no text"):
        load_text(lines(tmp_path / "blank.jsonl", {"text": " "}))


def test_chats_need_a_tokenizer_with_a_template(tmp_path):
    path = lines(tmp_path / "chat.jsonl", {"messages": MESSAGES})
    with pytest.raises(TextError, match="the model has none"):
        load_text(path)
    with pytest.raises(TextError, match="no chat template"):
        load_text(path, byte_tokenizer())


def test_of_many_chats_some_are_read_spread_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(chats, "MOST", 3)
    many = [{"prompt": str(i), "completion": ""} for i in range(9)]
    _, text = load_text(lines(tmp_path / "chat.jsonl", *many), chatting())
    assert [part[0] for part in text.split("<user>")[1:]] == ["0", "3", "6"]
    texts = [{"text": str(i)} for i in range(9)]
    assert len(load_text(lines(tmp_path / "texts.jsonl", *texts))[1].split()) == 9


def test_datasets_of_chats(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name, row in (
        ("messages", FORMS["messages"]),
        ("pairs", FORMS["prompt and completion"]),
        ("other", {"a": "b"}),
    ):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "train.jsonl", row, row)
    for source in ("messages::train:messages", "messages::train", "pairs::train"):
        assert load_text(f"dataset:{tmp_path}/{source}", chatting())[1] == 2 * WRITTEN
    assert load_text(f"dataset:{tmp_path}/pairs::train:prompt")[1] == "Hi\n\nHi"
    with pytest.raises(TextError, match="columns a: expected text, messages"):
        load_text(f"dataset:{tmp_path}/other::train")
    with pytest.raises(TextError, match="'b', and the dataset has a"):
        load_text(f"dataset:{tmp_path}/other::train:b")

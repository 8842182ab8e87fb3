"""Chats as TRL, LLaMA-Factory and ms-swift write them: one image, one question and one answer, or a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.invalid import SkippedRecords
from data.records import load_records
from tests.images import IMAGE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(IMAGE)
    return tmp_path


def load(folder: Path, *lines: Any, **options: Any) -> list[dict[str, Any]]:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows: list[dict[str, Any]] = load_records(messages=file, cache_dir=folder / "cache", **options).to_list()
    return rows


def chat(user: Any = "what is this?", assistant: Any = "a cat", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": turns, "images": ["a.jpg"], **more}


def says(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


FORMS = {
    "trl, texts": chat(),
    "trl, parts": {
        "messages": [says("user", {"type": "image"}, "what is this?"), says("assistant", "a cat")],
        "images": ["a.jpg"],
    },
    "trl, parts with all keys": {
        "messages": [
            says("user", {"type": "image", "text": None}, {"type": "text", "text": "what is this?", "image": None}),
            says("assistant", "a cat"),
        ],
        "images": [{"path": "a.jpg", "bytes": None}],
    },
    "trl, prompt and completion": {"prompt": "what is this?", "completion": "a cat", "images": ["a.jpg"]},
    "trl, messages in them": {
        "prompt": [says("user", {"type": "image"}, "what is this?")],
        "completion": [{"role": "assistant", "content": "a cat"}],
        "image": "a.jpg",
    },
    "a path in the part": {
        "messages": [says("user", {"type": "image", "image": "a.jpg"}, "what is this?"), says("assistant", "a cat")]
    },
    "llama-factory": {
        "conversations": turns(("human", "<image>what is this?"), ("gpt", "a cat")),
        "images": ["a.jpg"],
        "system": "",
    },
    "llava": {"conversations": turns(("human", "what is this?\n<image>"), ("gpt", "a cat")), "image": "a.jpg"},
    "ms-swift": chat("<image>what is this?", images="a.jpg"),
    "an empty system text": chat() | {"messages": [{"role": "system", "content": ""}, *chat()["messages"]]},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_users_text_is_the_prefix(folder: Path, form: str) -> None:
    (record,) = load(folder, FORMS[form])
    assert record["image"]["path"] == str(folder / "a.jpg")
    assert (record["prefix"], record["answers"], record["extra"]) == ("what is this?", ["a cat"], "")


def test_ids_and_what_else_there_is_are_kept(folder: Path) -> None:
    first, second, third = load(folder, chat("", id="mine"), chat(" <image> a <image", place="x"), chat(uuid="u"))
    assert (first["id"], first["prefix"]) == ("mine", "")
    assert (second["id"], second["prefix"], second["extra"]) == ("2", "a <image", '{"place": "x"}')
    assert load(folder, chat(uuid="u"), columns={"id": "uuid"})[0]["id"] == "u"
    assert third["id"] == "3"


SYSTEM = {"role": "system", "content": "be brief"}
ONE = "PaliGemma is given one prompt and gives one answer"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (chat(system="be brief"), f"it has a system text; {ONE}: put what is needed"),
        (chat() | {"messages": [SYSTEM, *chat()["messages"]]}, f"it has a system text; {ONE}"),
        (
            {"conversations": turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), "image": "a.jpg"},
            f"it has 4 messages, of user, assistant, user, assistant; .*for {ONE}: write a line for each question",
        ),
        (chat() | {"messages": chat()["messages"][:1]}, "it has 1 messages, of user; expected one of user and one of"),
        (chat() | {"messages": chat()["messages"][::-1]}, "it has 2 messages, of assistant, user"),
        (chat() | {"messages": [SYSTEM | {"content": " "}]}, "it has no messages; expected"),
        (chat() | {"messages": []}, r"expected a list of messages as messages, got \[\]"),
        (chat() | {"messages": "hello"}, "expected a list of messages as messages, got 'hello'"),
        (chat() | {"messages": ["hello"]}, "expected a message with role and content, got 'hello'"),
        (chat() | {"messages": turns(("human", "a"))}, "expected a message with role and content"),
        ({"conversations": chat()["messages"]}, "expected a message with from and value"),
        (chat() | {"messages": [{"role": "tool", "content": "x"}]}, "user, assistant, system as role, got 'tool'"),
        (chat() | {"messages": [{"role": "human", "content": "x"}]}, "user, assistant, system as role, got 'human'"),
        ({"conversations": turns(("function_call", "a"))}, "human, gpt as from, got 'function_call'"),
        (chat() | {"messages": [{"role": ["user"], "content": "x"}]}, r"as role, got \['user'\]"),
        (chat() | {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "a message calls tools"),
        (chat(user=3), "expected a text or a list of parts as content, got 3"),
        (chat(user=[{"type": "video"}]), 'expected {"type": "text", .* as part, got .*video'),
        (chat(user=[{"type": "image", "url": "https://a.example/b"}]), "as part, got .*url"),
        (chat(user=["x"]), "as part, got 'x'"),
        (chat(assistant="a <image>"), "the assistant's message has an image"),
        (chat(images=[]), "expected a path as image, got None; or allow rows of text .* text_rows: true"),
        (chat(images=["a.jpg", "b.jpg"]), "it has 2 images"),
        (chat(image="b.jpg"), "it has 2 images"),
        (chat("<image> or <image>?"), "it has 1 images, and 2 places"),
        (chat("<image>", images=None), "it has 0 images, and 1 places"),
        (chat(images=[3]), "expected a path as image, got 3"),
        (chat(images=["../a.jpg"]), "is no plain path"),
        ({"prompt": "x", "images": ["a.jpg"]}, "it has no completion"),
        (
            {"prompt": 3, "completion": "x", "images": ["a.jpg"]},
            "expected a text or a list of messages as prompt, got 3",
        ),
        (chat(prompt="x"), "expected one of messages, prompt and completion, or conversations, got messages, images"),
        ({"text": "x"}, "expected messages, prompt and completion, or conversations, got text"),
        (chat(suffix="x"), "it has suffix, which a chat has not; lines with columns are read with jsonl"),
        (["x"], "expected an object with messages, prompt and"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_line_that_is_no_example_is_named(folder: Path, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)chats\.jsonl, line 2: {message}|line 2: .*{message}"):
        load(folder, chat(), bad)
    skipped = SkippedRecords(share=0.5)
    assert len(load(folder, chat(), bad, skipped=skipped)) == 1
    assert list(skipped.reasons) == [f"{folder}/chats.jsonl, line 2"]


def test_a_line_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "chats.jsonl").write_text(json.dumps(chat()) + '\n{"messages": [\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 2: not valid JSON: Expecting value"):
        load_records(messages=folder / "chats.jsonl", cache_dir=folder)

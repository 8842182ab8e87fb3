"""JSON lines of chats, as TRL, LLaMA-Factory and ms-swift have them -> rows with image, prefix and suffix.

    {"messages": [{"role": "user", "content": "<image>what is this?"}, {"role": "assistant", "content": "a cat"}],
     "images": ["a.jpg"]}
    {"prompt": "what is this?", "completion": "a cat", "images": ["a.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>what is this?"}, {"from": "gpt", "value": "a cat"}],
     "images": ["a.jpg"]}

`content` may be a list of parts, {"type": "image"} and {"type": "text", "text": ...}; `prompt` and `completion` may be
lists of messages; `image` may name the one image too. The user's text is the whole prefix, without the marks `<image>`,
and nothing is put around it. PaliGemma is given one image and one prompt, and gives one answer: a line with a system
text, several turns or several images is no example. A chat without image and mark is a row of text alone (rows.py). A
further key `rejected` makes a line a preference pair. Not here: lines with `chosen` and `rejected` instead of an answer
(pairs.py).
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.sources.json_lines import lines_of
from data.sources.kinds import require_kind
from data.sources.rows import Table

ONE_ANSWER = "PaliGemma is given one prompt and gives one answer"
FORMS = "messages, prompt and completion, or conversations"
MARK = "<image>"
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "human": "user", "gpt": "assistant"}
IMAGES = ("images", "image")
USED = ("messages", "prompt", "completion", "conversations", *IMAGES, "system")


def messages(file: Path, folder: Path | None) -> Table:
    """The chats of a file. folder: of their images, by default its own. ValueError if it is of another kind."""
    require_kind(file, "messages", f"JSON lines, one chat a line: {FORMS}, with images")
    lines = lines_of(file, folder)

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        for number, values in lines.rows():
            try:
                yield number, values if isinstance(values, ValueError) else row_of(values)
            except ValueError as error:
                yield number, error

    return dataclasses.replace(lines, rows=rows)


@dataclasses.dataclass(frozen=True)
class Message:
    """A message without its marks of images.

    Attributes:
        role: user, assistant or system.
        images: an entry for each mark or part that stands for an image: its path, or None where it has none there.
    """

    role: str
    text: str
    images: list[Any]


def row_of(values: Any) -> dict[str, Any]:
    """A chat as a row. ValueError where it is none, or more than one question and answer about one image."""
    if not isinstance(values, dict):
        raise ValueError(f"expected an object with {FORMS}, got {values!r:.200}")
    if taken := sorted({"prefix", "question", "suffix"} & values.keys()):
        raise ValueError(f"it has {', '.join(taken)}, which a chat has not; lines with columns are read with jsonl")
    if values.get("system"):
        raise ValueError(f"it has a system text; {ONE_ANSWER}: put what is needed of it into the user's text")
    if is_pair(values):
        return values
    user, assistant = turn_of(_messages(values))
    image = image_of(values, user)
    rest = {key: value for key, value in values.items() if key not in USED}
    return {"image": image, "prefix": user.text.strip(), "suffix": assistant.text, **rest}


def is_pair(columns: Collection[str]) -> bool:
    """Whether these are TRL's columns of a preference pair, also where one of its two answers is missing."""
    found = set(columns)
    return ("chosen" in found or {"prompt", "rejected"} <= found) and not {"messages", "completion"} & found


def _messages(values: Mapping[str, Any]) -> list[Message]:
    forms = [form for form in (("messages",), ("prompt", "completion"), ("conversations",)) if form[0] in values]
    if len(forms) != 1:
        got = ", ".join(map(str, values)) or "nothing"
        raise ValueError(f"expected {'one of ' if forms else ''}{FORMS}, got {got:.200}")
    if missing := [name for name in forms[0] if name not in values]:
        raise ValueError(f"it has no {missing[0]}; expected {FORMS}")
    found: list[Message] = []
    for name in forms[0]:
        role = {"prompt": "user", "completion": "assistant"}.get(name)
        keys = ("from", "value") if name == "conversations" else ("role", "content")
        found += [message_of(one, *keys) for one in listed(values[name], name, role)]
    return found


def listed(given: Any, name: str, role: str | None) -> list[Any]:
    """The messages of the column `name`, where a text stands for one of `role`. ValueError where it has none."""
    if role is not None and isinstance(given, str):
        return [{"role": role, "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected a {'text or a ' if role else ''}list of messages as {name}, got {given!r:.200}")
    return given


def message_of(given: Any, role_key: str = "role", text_key: str = "content") -> Message:
    """A message. ValueError where it is none, or one that PaliGemma has no place for."""
    if not isinstance(given, dict) or not {role_key, text_key} <= given.keys():
        raise ValueError(f"expected a message with {role_key} and {text_key}, got {given!r:.200}")
    role, content = given[role_key], given[text_key]
    known = ROLES if role_key == "from" else {name: name for name in ("user", "assistant", "system")}
    if not isinstance(role, str) or role not in known:
        raise ValueError(f"expected {', '.join(known)} as {role_key}, got {role!r:.200}; {ONE_ANSWER}")
    if given.get("tool_calls"):
        raise ValueError(f"a message calls tools; {ONE_ANSWER}")
    text, images = _text_and_images(content, text_key)
    return Message(known[role], text.replace(MARK, ""), [*images, *[None] * text.count(MARK)])


def _text_and_images(content: Any, key: str) -> tuple[str, list[Any]]:
    """The texts of a content, one after the other, and what its parts name as images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError(f"expected a text or a list of parts as {key}, got {content!r:.200}")
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        # TRL and datasets write the keys of all parts into each, with null where one has none.
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and not part.get("url") and not part.get("base64"):
            images.append(part.get("image") or part.get("path"))
        else:
            raise ValueError(
                f'expected {{"type": "text", "text": ...}} or {{"type": "image"}} as part, got {part!r:.200}'
            )
    return "".join(texts), images


def turn_of(chat: list[Message]) -> tuple[Message, Message]:
    """The question and the answer of a chat that has one of each."""
    chat = [one for one in chat if one.role != "system" or one.text.strip() or one.images]
    roles = [one.role for one in chat]
    if "system" in roles:
        raise ValueError(f"it has a system text; {ONE_ANSWER}: put what is needed of it into the user's text")
    if roles != ["user", "assistant"]:
        said = f"it has {len(roles)} messages, of {', '.join(roles)}" if roles else "it has no messages"
        advice = ": write a line for each question with its answer" if len(roles) > 2 else ""
        raise ValueError(f"{said:.200}; expected one of user and one of assistant, for {ONE_ANSWER}{advice}")
    user, assistant = chat
    if assistant.images:
        raise ValueError("the assistant's message has an image; PaliGemma answers with text alone")
    return user, assistant


def image_of(values: Mapping[str, Any], user: Message, names: Sequence[str] = IMAGES) -> Any:
    """What names the one image of a chat, in the columns `names` or in a part of the user's message; None
    without an image and a place for one.
    """
    given = [values[name] for name in names if values.get(name) is not None]
    named = [one for value in given for one in (value if isinstance(value, list) else [value])]
    named += [image for image in user.images if image is not None]
    if not named and not user.images:
        return None
    if max(len(named), len(user.images)) != 1 or not named:
        raise ValueError(
            f"it has {len(named)} images, and {len(user.images)} places for one in the user's message; expected one "
            "image, in images, with at most one place: PaliGemma sees one"
        )
    return named[0]

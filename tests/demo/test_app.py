"""What the page shows, without a browser and without gradio; tests/browser clicks through it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.demo import __main__ as command
from finetune.demo import app
from finetune.demo.answer import Answered, Token
from finetune.demo.app import answer_html, boxes_shown, filled
from finetune.demo.networks import Opened

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class PageError(Exception):
    """Stands for gradio.Error: its message is HTML."""

    def __init__(self, message: str, **settings: bool) -> None:
        super().__init__(message)


PAGE: Any = SimpleNamespace(update=dict, Error=PageError)


def test_without_gradio_the_command_says_what_to_install(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("finetune.demo.networks.open_base", lambda *given: pytest.fail("opened all the same"))
    with pytest.raises(ValueError, match="the demo needs gradio: pip install"):
        command.main([str(adapters[0])])


def test_what_a_network_writes_stays_text() -> None:
    shown = answer_html(Answered(HOSTILE, [5], [Token(HOSTILE, 0.5)], True))
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;script&gt;") == 2


def test_an_answer_shows_each_tokens_probability() -> None:
    shown = answer_html(Answered("two cats", [5, 6], [Token("two", 0.987), Token(" cats", 0.5)], False))
    assert "98.7%" in shown
    assert "50.0%" in shown
    assert "cut off" in shown
    assert "(nothing)" in answer_html(Answered("", [1], [Token("<eos>", 1.0)], True))


def test_the_question_goes_into_the_prompt() -> None:
    assert filled("answer en {question}", " how many? ") == "answer en how many?"
    assert filled("caption en", "not asked") == "caption en"
    for prompt, question in (("answer en {question}", " "), ("", "what?"), ("{question}", "")):
        with pytest.raises(ValueError, match="there is no question"):
            filled(prompt, question)


def test_asking_and_explaining(opened: Opened, scene: Path) -> None:
    """Every network answers; heat maps are of the question that was asked, for each network's own answer."""
    answer = app.asking(PAGE, opened.networks)
    state, *shown = answer(str(scene), "what is it?", "answer en {question}", 0, 1, 0, 4)
    assert list(state.answers) == ["base", "one", "two", "wide"]
    assert state.prompt == "answer en what is it?"
    assert shown[:8:2] == [answer_html(found) for found in state.answers.values()]
    assert len(shown) == 16
    assert shown[8:] == [{"value": None, "visible": False}, ""] * 4
    explained = app.explaining(PAGE, opened.networks, 16)(state, 2)
    assert [part["visible"] for part in explained[::2]] == [True] * 4
    whole = [1.0] * 4
    for i, found in enumerate(state.answers.values()):
        for token in found.tokens:
            whole[i] *= token.probability
    for sentence, expected in zip(explained[1::2], whole, strict=True):
        assert float(sentence.split(" has ")[1].split("%")[0]) == pytest.approx(100 * expected, abs=0.1)


def test_a_mistake_is_a_message_of_text(opened: Opened, scene: Path) -> None:
    answer = app.asking(PAGE, opened.networks)
    with pytest.raises(PageError, match="there is no image"):
        answer(None, "what?", "{question}", 0, 1, 0, 4)
    with pytest.raises(PageError, match="there is no question"):
        answer(str(scene), "", "{question}", 0, 1, 0, 4)
    with pytest.raises(PageError, match="&lt;eos&gt;"):
        answer(str(scene), "<eos>", "{question}", 0, 1, 0, 4)
    with pytest.raises(PageError, match="there is no answer yet"):
        app.explaining(PAGE, opened.networks, 16)(None, 2)


def test_boxes_are_shown_where_an_answer_has_some(opened: Opened, scene: Path) -> None:
    found = Answered("<loc0000><loc0000><loc0512><loc0512> cat", [5], [], True)
    assert boxes_shown(opened.networks[0], str(scene), found)["visible"]
    assert boxes_shown(opened.networks[0], str(scene), Answered("cat", [5], [], True)) == {
        "value": None,
        "visible": False,
    }

"""Texts of a person reach the screen as they are: not parsed, not executed, not cut, not lost to an encoding."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.system import console
from finetune.system.console import new_table
from finetune.system.terminal import UNSAFE, json_line, one_line, plain_warnings, shortened, visible

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "[cat] on [mat]",
    "[INST] x [/INST]",
    "[/]",
    "[bold red]",
    "[link=file:///etc/passwd]y[/link]",
    ":smile:",
    "\\[a]",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "a\rb",
    "\u202egnp.exe",
    "half \ud83d of one",
    "<loc0001>" * 40,
    "漢字" * 60,
)
TEXTS = st.one_of(st.text(), st.sampled_from(HOSTILE), st.lists(st.sampled_from([*HOSTILE, " "])).map("".join))


def shown(*objects: object) -> str:
    """What `show` writes to a terminal that is 60 columns wide and understands escape sequences."""
    stream = io.StringIO()
    plain = console.PlainConsole(file=stream, width=60, force_terminal=True, color_system="truecolor")
    for item in objects:
        plain.print(item, soft_wrap=isinstance(item, str))
    return stream.getvalue()


@settings(deadline=None)
@given(TEXTS)
def test_a_line_shows_every_character_of_a_text(text: str) -> None:
    text = text.replace("\t", " ")  # which the terminal expands
    assert shown(text) == visible(text) + "\n"


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_a_table_shows_every_character_of_a_text(cell: str, title: str) -> None:
    table = new_table("id", "text", title=title)
    table.add_row("1", cell)
    styles = re.compile("\x1b\\[[0-9;]*m")  # of the table's own head
    drawn = styles.sub("", shown(table))
    assert not UNSAFE.search(drawn)
    # However lines were broken, the characters of cell and title are there, as often as in them or more.
    wanted = "".join((visible(cell) + visible(title)).split())
    assert all(drawn.count(character) >= wanted.count(character) for character in set(wanted))


@given(st.text(), st.sampled_from(["cp1252", "ascii", "utf-8"]))
def test_a_json_line_can_be_written_and_read_back(text: str, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    line = json_line({"answer": text}, stream)
    line.encode(encoding)
    assert not UNSAFE.search(line)
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"answer": text}


@given(st.text())
def test_a_field_is_one_line_without_tabs(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    assert "\t" not in one_line(text)
    assert visible(visible(text)) == visible(text)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_no_answer_is_lost_to_an_encoding(encoding: str) -> None:
    """In a program that runs as the scripts do, on both streams, from print, rich and tqdm alike."""
    code = (
        "import sys\nfrom tqdm import tqdm\nfrom finetune import cli\nfrom finetune.system import console\n"
        "def main(argv):\n"
        "    for answer in ('cat', '\\u732b', 'caf\\xe9 \\U0001f600', 'dog'): print(answer)\n"
        "    console.show('shown \\u732b')\n"
        "    table = console.new_table('\\u732b')\n"
        "    table.add_row('\\u732b')\n"
        "    console.show(table)\n"
        "    raise ValueError('refused \\u732b [/red]')\n"
        "cli.run(main)\n"
    )
    environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    out, err = ran.stdout.decode(encoding), ran.stderr.decode(encoding)
    assert ran.returncode == 2, err
    lines = out.splitlines()
    assert lines[:2] == ["cat", "\\u732b"]
    assert lines[2].endswith("\\U0001f600")
    assert lines[3:5] == ["dog", "shown \\u732b"]
    assert out.count("\\u732b") == 4
    assert err == "error: refused \\u732b [/red]\n"


def test_a_warning_of_ours_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: theirs.append(str(message)))
    with plain_warnings():
        warnings.showwarning("ours \x1b", UserWarning, str(ROOT / "finetune/training/trainer.py"), 1)
        warnings.showwarning("theirs", UserWarning, "/elsewhere/library.py", 3)
        warnings.showwarning("old", DeprecationWarning, str(ROOT / "train.py"), 3)
    assert capsys.readouterr().err == "warning: ours \\x1b\n"
    assert theirs == ["theirs", "old"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 20, "x" * 20),
        ("a" * 10 + "b" * 20, "a" * 10 + " [10 characters not shown] " + "b" * 10),
        ("c" * 2000, "c" * 10 + " [1,980 characters not shown] " + "c" * 10),
    ],
)
def test_a_long_text_is_shortened_in_the_middle(text: str, shown: str) -> None:
    assert shortened(text, 20) == shown

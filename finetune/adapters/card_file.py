"""README.md beside an adapter or a checkpoint: a text for people, written after the directory is whole.

It is in no manifest, so it may be edited, rewritten or deleted without the weights counting as damaged. Its last line
holds a digest of the text above it: a card that a person has edited since is told apart, and never overwritten.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from finetune.system.atomic import write_text_whole

CARD_FILE = "README.md"
MARK = "<!-- sha256 of the text above: {}; a card that was edited is not overwritten -->\n"
MARKED = re.compile(r"(.*\n)" + re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"), re.DOTALL)


def write_card(directory: Path, text: str) -> bool:
    """Write the card of a directory; False where a person has written or edited the one that is there.

    Raises:
        OSError: it cannot be written; one that was there stands.
    """
    if is_edited(directory):
        return False
    write_text_whole(directory / CARD_FILE, signed(text))
    return True


def signed(text: str) -> str:
    """The text, which ends in a newline, with its digest."""
    return text + MARK.format(digest(text))


def is_edited(directory: Path) -> bool:
    """Whether there is a card that is not, to the letter, one that was written here."""
    try:
        found = (directory / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    match = MARKED.fullmatch(found)
    return match is None or digest(match[1]) != match[2]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

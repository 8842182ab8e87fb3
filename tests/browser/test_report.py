"""The report as a person uses it: filters and their counts, dark, on a phone, and with hostile texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from data.records import load_records
from data.synthetic import scenes
from finetune.config.load import dump_config, load_config
from finetune.evaluation.answer import Answer
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.tasks import TASKS
from finetune.report.page import write_comparison, write_page
from tests.browser.conftest import contrast, on_phone, overflow

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> <b>&amp;</b> \' "' + "w" * 200
TYPES = ["number", "other", "yes/no"]


def make_run(root: Path, name: str, every: int, hostile: bool = False) -> Path:
    """An evaluated run, without training: the adapter answers every `every`th question rightly, the base none.

    hostile: questions, answers and one type of answer are texts that try to be more.
    """
    files: dict[str, Any] = {
        "questions": f"{root}/data/v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": f"{root}/data/v2_mscoco_val2014_annotations.json",
        "images": f"{root}/data/images",
    }
    directory = root / name
    data = f"data={json.dumps({'train': files, 'validation': files})}"
    config = load_config(ROOT / "configs/quickstart.yaml", [data, f"output={directory}"])
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    steps = [{"step": i, "seconds": float(i), "loss": 1 / i, "memory_gib": 1.5} for i in range(1, 30)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    records: list[dict[str, Any]] = [dict(record) for record in load_records(**files)]
    for arm in ("base", "adapter"):
        generated = {}
        for i, record in enumerate(records):
            right = arm == "adapter" and i % every == 0
            generated[record["id"]] = Answer(record["answer"] if right else HOSTILE if hostile else "?", True, -0.5)
        shown = [record | {"question": HOSTILE, "answer_type": HOSTILE} if hostile else record for record in records]
        Evaluation(generated, TASKS["vqa"], TASKS["vqa"].score(generated, records), 4).save(
            directory / "eval" / arm, shown
        )
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    scenes.write(directory / "data", scenes=12, seed=2, split="val2014")
    return directory


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    directory = make_run(root, "run", 3)
    with pytest.MonkeyPatch.context() as patch:  # a long value leaves its name little room
        environment = {"device": "cpu", "transformers": "5.0", "commit": "0123456789" * 8}
        patch.setattr("finetune.report.page.environment_of", lambda device: environment)
        write_page(directory)
    return directory


@pytest.fixture(scope="module")
def hostile(root: Path) -> Path:
    directory = make_run(root, "<b onclick=alert(1)>run", 3, hostile=True)
    write_page(directory)
    return directory


@pytest.fixture(scope="module")
def comparison(run: Path, root: Path) -> Path:
    return write_comparison([run, make_run(root, "other", 2)], root / "comparison.html")


def test_filters_show_what_they_say_and_how_many(tab: Page, run: Path) -> None:
    answers = [json.loads(line) for line in (run / "eval/adapter/answers.jsonl").read_text().splitlines()]
    before = {line["id"]: line for line in map(json.loads, (run / "eval/base/answers.jsonl").read_text().splitlines())}

    def holds(line: dict[str, Any], outcome: str, answer_type: str) -> bool:
        outcomes = {
            "all": True,
            "right": line["score"] >= 50,
            "wrong": line["score"] < 50,
            "changed": line["answer"] != before[line["id"]]["answer"],
        }
        return outcomes[outcome] and answer_type in ("every type", line["answer_type"])

    tab.goto((run / "report.html").as_uri())
    numbers = set()
    for answer_type in ["every type", *TYPES]:
        tab.get_by_role("button", name=answer_type, exact=True).click()
        for outcome in ("right", "wrong", "changed", "all"):
            tab.get_by_role("button", name=outcome, exact=True).click()
            expected = sum(holds(line, outcome, answer_type) for line in answers)
            shown = [one for one in tab.locator(".question").all() if one.is_visible()]
            assert int(tab.locator("#shown").inner_text()) == len(shown) == expected
            for card in tab.locator(".card").all():
                assert card.is_visible() == any(one.is_visible() for one in card.locator(".question").all())
            pressed = tab.locator(".filters button[aria-pressed=true]").all_inner_texts()
            assert pressed == [outcome, answer_type]
            numbers.add(expected)
    assert len(numbers) > 6


def test_every_image_is_shown(tab: Page, run: Path) -> None:
    tab.goto((run / "report.html").as_uri())
    images = tab.locator(".card img").all()
    assert len(images) == 12
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.evaluate("async image => { await image.decode(); return image.naturalWidth }") > 0


def test_boxes_lie_on_their_image_and_are_hidden_with_their_question(tab: Page, run: Path) -> None:
    """The lower right quarter of an image is expected, and the adapter, which is right, says so."""
    copy = run.parent / "boxes"
    shutil.copytree(run, copy)
    box = "<loc0512><loc0512><loc1023><loc1023> " + "w" * 80
    for arm in ("base", "adapter"):
        file = copy / "eval" / arm / "answers.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        marked = next(line for k, line in enumerate(lines) if k % 3 == 0)  # those the adapter answers rightly
        marked |= {"expected": [box], "answer": box if arm == "adapter" else "nothing"}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tab.goto(write_page(copy).as_uri())
    drawn = tab.locator("rect.box")
    assert drawn.count() == 2
    card = tab.locator(".card", has=drawn)
    image, place = (one.bounding_box() for one in (card.locator("img"), drawn.first))
    assert image
    assert place
    assert place["x"] == pytest.approx(image["x"] + image["width"] / 2, abs=4)
    assert place["y"] == pytest.approx(image["y"] + image["height"] / 2, abs=4)
    assert place["width"] == pytest.approx(image["width"] / 2, abs=6)
    assert place["height"] == pytest.approx(image["height"] / 2, abs=6)
    assert drawn.first.is_visible()
    tab.get_by_role("button", name="wrong", exact=True).click()
    assert card.is_visible()  # other questions about this image were answered wrongly
    assert not drawn.first.is_visible()
    on_phone(tab)
    assert overflow(tab) == 0


@pytest.mark.parametrize("page", ["run", "comparison"])
def test_a_phone_never_scrolls_sideways(tab: Page, run: Path, hostile: Path, comparison: Path, page: str) -> None:
    on_phone(tab)
    for file in [run / "report.html", hostile / "report.html"] if page == "run" else [comparison]:
        tab.goto(file.as_uri())
        assert overflow(tab) == 0
        assert tab.locator(".question").first.is_visible()


def test_names_of_facts_are_whole_words_on_a_phone(tab: Page, run: Path) -> None:
    on_phone(tab)
    tab.goto((run / "report.html").as_uri())
    name = tab.get_by_role("cell", name="transformers", exact=True)
    lines = "cell => cell.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).lineHeight)"
    assert name.evaluate(lines) < 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_by_day_and_by_night(tab: Page, run: Path, scheme: Literal["light", "dark"]) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.goto((run / "report.html").as_uri())
    background = tab.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert sum(map(int, background[4:-1].split(","))) < 100 if scheme == "dark" else background == "rgb(255, 255, 255)"
    pressed, other = (f".filters button[aria-pressed={value}]" for value in ("true", "false"))
    for selector in ("h1", ".lead", "p.soft", ".question p", ".question .soft", "td.right", "td.wrong", pressed, other):
        assert contrast(tab, selector) >= 4.5, selector
    ink = tab.locator("svg text").first.evaluate("text => getComputedStyle(text).fill")
    assert ink == tab.locator("body").evaluate("body => getComputedStyle(body).color")


def test_hostile_texts_do_nothing_and_filters_work(tab: Page, hostile: Path) -> None:
    """`tab` fails the test where a dialog opens or a script fails."""
    tab.goto((hostile / "report.html").as_uri())
    assert tab.locator("script").count() == 1
    assert tab.locator("h1").inner_text() == hostile.name
    assert tab.locator(".question p").first.inner_text() == HOSTILE
    assert tab.locator("[onerror], [onclick]").count() == 0
    whole = int(tab.locator("#shown").inner_text())
    tab.locator(".filters button[data-group=type]").nth(1).click()
    assert int(tab.locator("#shown").inner_text()) == whole
    tab.get_by_role("button", name="wrong", exact=True).click()
    assert 0 < int(tab.locator("#shown").inner_text()) < whole


def test_a_comparison_shows_what_differs(tab: Page, comparison: Path, run: Path) -> None:
    """Of every 6 questions one run alone answers 3: the other run alone that at 3, this one those at 2 and 4."""
    tab.goto(comparison.as_uri())
    total = len((run / "eval/adapter/answers.jsonl").read_text().splitlines())
    expected = sum((i % 3 == 0) != (i % 2 == 0) for i in range(total))
    assert int(tab.locator("#shown").inner_text()) == expected
    tab.get_by_role("button", name="changed", exact=True).click()
    assert int(tab.locator("#shown").inner_text()) == expected

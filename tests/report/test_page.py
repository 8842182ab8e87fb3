"""The HTML report: what it says, that it needs nothing from outside, and that hostile texts stay texts."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import evaluate
import train
from finetune import __main__ as console
from finetune.report import charts, gallery
from finetune.report.labels import MOST_FIGURES
from finetune.report.page import write_comparison, write_page
from finetune.report.run_data import Arm, latest, read_run
from tests.test_scripts import ROOT, base_with_scenes, overrides

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> &amp; \' "'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_with_scenes(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and evaluated."""
    output = tmp_path_factory.mktemp("runs") / "one"
    words = [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output)]
    train.main(words)
    evaluate.main(words)
    return output


class Page(HTMLParser):
    """Tags with their attributes, and text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_what_a_page_says(run: Path, base: Path) -> None:
    page = Page((run / "report.html").read_text())
    metrics = json.loads((run / "eval/adapter/metrics.json").read_text())
    assert f"{metrics['overall']:.2f}% rightly (95% confidence: {metrics['interval'][0]:.2f} to" in page.text
    assert f"adapter {metrics['others']['expected calibration error']:.2f}" in page.text
    assert "confidence, percent" in page.text
    answers = [json.loads(line) for line in (run / "eval/adapter/answers.jsonl").read_text().splitlines()]
    shown = [attributes for attributes in page.of("div") if attributes.get("class") == "question"]
    assert len(shown) == len(answers)
    for outcome in ("right", "wrong"):
        expected = sum((line["score"] >= 50) == (outcome == "right") for line in answers)
        assert sum(attributes["data-outcome"] == outcome for attributes in shown) == expected
    assert len(page.of("img")) == len({line["image_id"] for line in answers}) == 12
    for heading in ("By type of answer", "Training", "What it answers", "What was trained", "Configuration"):
        assert heading in page.text
    assert re.search(r"language\s*down_proj\s*3\s*32", re.sub(r"\s+", " ", page.text))
    assert "learning_rate: 0.01" in page.text


def test_a_page_needs_nothing_from_outside_and_tells_no_path(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "url(http" not in text
    assert str(run.parent.parent) not in text
    assert len(text) < 5_000_000
    policy = next(attributes for attributes in page.of("meta") if "http-equiv" in attributes)
    assert "default-src 'none'" in (policy["content"] or "")


def test_hostile_texts_stay_texts(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "<b>run</b>"
    shutil.copytree(run, copy)
    for arm in ("base", "adapter"):
        file = copy / "eval" / arm / "answers.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line |= {
                "question": HOSTILE,
                "answer": HOSTILE,
                "expected": [HOSTILE],
                "answer_type": HOSTILE,
                "score": 0.0,
            }
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before, after = (Page((path / "report.html").read_text()) for path in (run, write_page(copy).parent))
    assert HOSTILE in after.text
    assert len(after.of("script")) == len(before.of("script")) == 1
    assert not any("onerror" in attributes for _, attributes in after.tags)
    assert len(after.of("img")) == len(before.of("img"))


def test_names_in_charts_are_no_formulas_and_none_is_hidden() -> None:
    """matplotlib reads $...$ as a formula, and leaves names that begin with "_" out of a legend."""
    names = ["_one", "$\\frac{$", "a$b$c"]
    drawn = charts.curves(dict.fromkeys(names, ([1, 2], [1.0, 2.0])), "loss")
    drawn += charts.bars({name: dict.fromkeys(names, 1.0) for name in names}, {}, "percent")
    shown = Page(drawn).text
    for name in names:
        assert shown.count(name) == 3  # in two legends, and at an axis


def test_long_labels_of_charts_go_on_in_the_next_line() -> None:
    """A mixture's metric names each source; what is wider than the figure would be cut off."""
    label = "mean of " + " and ".join(f"accuracy (source_{number})" for number in range(9))
    for chart in (charts.bars({"": {"base": 1.0}}, {}, label), charts.curves({"run": ([1, 2], [1.0, 2.0])}, label)):
        lines = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart) if "source_" in text]
        assert " ".join(lines) == label
        assert max(map(len, lines)) <= 70


def test_line_separators_in_answers_are_no_ends_of_lines(run: Path, tmp_path: Path) -> None:
    answer = "red\u2028circle\x85"
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/eval/adapter/answers.jsonl"
    lines = [json.loads(line) | {"answer": answer} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert answer in Page(write_page(tmp_path / "run").read_text()).text


def test_a_broken_line_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')
    count = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {count}, is no JSON \(.*\): delete that line"):
        write_page(tmp_path / "run")


def test_a_run_that_was_not_evaluated_has_a_page_too(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/eval")
    page = Page(write_page(tmp_path / "run").read_text())
    assert "It has not been evaluated yet" in page.text
    assert "Training" in page.text
    assert not page.of("img")


def test_weights_that_are_newer_than_the_figures_are_told(run: Path, tmp_path: Path) -> None:
    """Trained on after the evaluation; and a base that answered other questions is not compared."""
    shutil.copytree(run, tmp_path / "run")
    before = Page(write_page(tmp_path / "run").read_text()).text
    (tmp_path / "run/adapter/adapter_model.safetensors").touch()
    file = tmp_path / "run/eval/base/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"made_of": {"limit": 3}}))
    after = Page(write_page(tmp_path / "run").read_text()).text
    for said, where in (("; the base answers", before), ("The weights were written after that: evaluate.py", after)):
        assert (said in before, said in after) == (where is before, where is after)


def test_images_that_are_gone_leave_the_figures(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("/data/", "/gone/"))
    page = Page(write_page(tmp_path / "run").read_text())
    assert "By type of answer" in page.text
    assert not page.of("img")


def test_images_that_can_no_longer_be_opened_are_left_out(run: Path, base: Path, tmp_path: Path) -> None:
    """One is deleted, one cut off: the others are shown, and nothing else is written."""
    shutil.copytree(base / "data", tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    text = (
        config.read_text()
        .replace(f"{base}/data", f"{tmp_path}/data")
        .replace(f"output: {run}", f"output: {tmp_path}/elsewhere")
    )
    config.write_text(text.replace("on_error: fail", "on_error: skip"))
    before = len(Page((run / "report.html").read_text()).of("img"))
    gone, cut, *_ = sorted((tmp_path / "data/images").glob("*val2014*"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    assert len(Page(write_page(tmp_path / "run").read_text()).of("img")) == before - 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_without_validation_records_that_was_evaluated_on_others_has_a_page(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    text = re.sub(r"  validation:.*?(?=  prompt:)", "  validation: null\n", config.read_text(), flags=re.S)
    config.write_text(re.sub(r"eval_every: \d+", "eval_every: null", text))
    page = Page(write_page(tmp_path / "run").read_text())
    assert "By type of answer" in page.text
    assert not page.of("img")
    shutil.rmtree(tmp_path / "run/eval")
    page = Page(write_page(tmp_path / "run").read_text())
    assert "The run has no data.validation, and so nothing to evaluate on." in page.text
    assert "evaluate.py" not in page.text


def test_runs_beside_each_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "two"
    shutil.copytree(run, other)
    text = (run / "config.yaml").read_text().replace("rank: 32", "rank: 4")
    text = re.sub(r"images: \S*", "images: /somewhere/of/mine/images", text, count=1)
    (other / "config.yaml").write_text(text.replace("project: paligemma-lora", "project: mine"))
    file = other / "eval/adapter/answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    turned = lines[0]["question"]
    lines[0]["score"] = 0.0 if lines[0]["score"] >= 50 else 100.0
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    console.dispatch(["report", str(run), str(other), "--output", str(tmp_path / "both.html")])
    page = Page((tmp_path / "both.html").read_text())
    assert "lora.rank: was 32, is 4" in page.text
    assert "data.train.images: was images, is images" in page.text
    for private in ("/somewhere", str(run.parent.parent), "tracking", str(tmp_path)):
        assert private not in page.text
    shown = [attributes for attributes in page.of("div") if attributes.get("class") == "question"]
    assert len(shown) == 1
    assert turned in page.text
    with pytest.raises(ValueError, match="same name cannot be told apart"):
        write_comparison([run, run], tmp_path / "x.html")


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.yaml: expected the directory of a run"):
        read_run(tmp_path)


def test_what_was_trained_again_after_an_interruption_counts_once() -> None:
    steps = [{"step": step, "seconds": float(i)} for i, step in enumerate((10, 20, 30, 20, 30, 30, 40))]
    assert [(line["step"], line["seconds"]) for line in latest(steps)] == [
        (10, 0),
        (20, 1),
        (20, 3),
        (30, 4),
        (30, 5),
        (40, 6),
    ]


def test_confusions() -> None:
    answered: list[dict[str, Any]] = [
        {"id": str(i), "expected": [right] * 10, "answer": given, "score": 100.0 * (right == given)}
        for i, (right, given) in enumerate([("2", "2"), ("2", "3"), ("2", "3"), ("red", "red")])
    ]
    arm = Arm("adapter", {}, {line["id"]: line for line in answered})
    assert arm.confusions == [("2", 3, [("3", 2)]), ("red", 1, [])]


def test_a_page_is_full_at_its_limit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted((base / "data/images").glob("*.jpg"))
    line = {"question": "q", "answer_type": "", "expected": ["a"], "answer": "a", "score": 100.0}
    answers = {str(i): line | {"id": str(i), "image_id": str(i)} for i in range(len(paths))}
    images = {str(i): str(path) for i, path in enumerate(paths)}
    arms = {"adapter": Arm("adapter", {}, answers)}
    assert len(gallery.cards_of(arms, images)) == len(paths)
    monkeypatch.setattr(gallery, "MOST_BYTES", 3 * max(len(gallery.thumbnail(path)) for path in paths))
    assert 3 <= len(gallery.cards_of(arms, images)) < len(paths)


def test_a_row_of_text_has_a_card_without_an_image() -> None:
    line = {"question": "q", "answer_type": "", "expected": ["a"], "answer": "a", "score": 100.0}
    arms = {"adapter": Arm("adapter", {}, {"1": line | {"id": "1", "image_id": "of 1"}})}
    (card,) = gallery.cards_of(arms, {"of 1": None})
    assert (card.image, [one.question for one in card.questions], card.has_boxes) == (None, ["q"], False)


def rewritten(run: Path, copy: Path, metrics: dict[str, Any], line: dict[str, Any], count: int = 1) -> Page:
    """The page of a run with other figures, and with other values in the first lines of its answers."""
    shutil.copytree(run, copy)
    for arm in ("base", "adapter"):
        figures, answers = copy / "eval" / arm / "metrics.json", copy / "eval" / arm / "answers.jsonl"
        figures.write_text(json.dumps(json.loads(figures.read_text()) | metrics))
        lines = [json.loads(text) for text in answers.read_text().splitlines()]
        changed = [one | (line if k < count else {}) for k, one in enumerate(lines)]
        answers.write_text("".join(json.dumps(one) + "\n" for one in changed))
    return Page(write_page(copy).read_text())


def test_boxes_are_drawn_over_images_and_locations_are_numbers(run: Path, tmp_path: Path) -> None:
    """What is expected and what each arm answered are told apart, and labels stay texts."""
    label = 'cat" onclick="alert(1)'
    first, second = (f"<loc0000><loc0512><loc0{bottom}><loc1023> {label}" for bottom in (256, 512))
    line = {"expected": [first], "answer": f"{first} ; {second}", "question": f"detect {label}", "answer_type": ""}
    page = rewritten(run, tmp_path / "run", {"task": "detect", "by_label": {label: 12.5}, "label_metric": "x"}, line)
    drawn = [attributes for attributes in page.of("rect") if (attributes.get("class") or "").startswith("box")]
    assert [attributes["class"] for attributes in drawn] == ["box of-0"] + ["box of-1"] * 2 + ["box of-2"] * 2
    places = [[float(one[key] or "") for key in ("x", "y", "width", "height")] for one in drawn[:3]]
    low, high = [150, 0, 150, 75], [150, 0, 150, 150]
    assert places == [pytest.approx(place, abs=0.3) for place in (low, low, high)]
    assert "<loc" not in page.text
    assert page.text.count(f"[0 512 256 1023] {label}") == 3
    assert "Boxes on the images:" in page.text
    assert not any("onclick" in attributes for _, attributes in page.tags)
    assert "12.50" in page.text
    without = Page((run / "report.html").read_text())
    assert "Boxes on the images:" not in without.text
    assert not [attributes for attributes in without.of("svg") if attributes.get("class") == "layer"]


def test_boxes_of_a_network_that_pads_its_images_are_where_it_saw_them(tmp_path: Path) -> None:
    """Locations of the square around an image twice as wide as high."""
    Image.new("RGB", (80, 40)).save(tmp_path / "wide.png")
    text = "<loc0256><loc0000><loc0767><loc0512> cat"
    line = {
        "id": "1",
        "image_id": "wide",
        "question": "detect cat",
        "answer_type": "",
        "expected": [text],
        "score": 0.0,
    }
    arms = {name: Arm(name, {}, {"1": line | {"answer": text}}) for name in ("base", "adapter")}
    for aspects, top, height in (({}, 37.5, 75), (dict.fromkeys(arms, "pad"), 0, 150)):
        (card,) = gallery.cards_of(arms, {"wide": str(tmp_path / "wide.png")}, aspects)
        assert card.height == 150
        assert [box.whose for box in card.boxes[0]] == ["expected", "base", "adapter"]
        for box in card.boxes[0]:
            assert (box.label, box.left, box.width) == ("cat", 0, pytest.approx(150, abs=0.3))
            assert (box.top, box.height) == pytest.approx((top, height), abs=0.3)


def test_locations_are_shown_as_numbers() -> None:
    assert (
        gallery.short("<loc0010><loc0200><loc0300><loc1023> cat ; <loc0001> dog") == "[10 200 300 1023] cat ; [1] dog"
    )
    assert gallery.short("detect <b> ; <loc12>") == "detect <b> ; <loc12>"


def test_a_figure_that_is_no_percentage_is_not_called_one(run: Path, tmp_path: Path) -> None:
    figures: dict[str, Any] = {"metric": "CIDEr-D", "unit": "times 100", "overall": 143.21, "interval": [140, 146.5]}
    figures |= {"task": "caption", "others": {"BLEU-4": 33.3}, "by_answer_type": {}}
    page = rewritten(run, tmp_path / "run", figures, {})
    assert "have CIDEr-D of 143.21, times 100 (95% confidence: 140.00 to 146.50); those of the base 143.21" in page.text
    assert "CIDEr-D, times 100, with 95% intervals" in page.text
    assert "CIDEr-D, percent" not in page.text
    assert "BLEU-4, percent" in page.text
    assert "The most frequent answers" not in page.text


def test_labels_that_are_confused_are_a_matrix(run: Path, tmp_path: Path) -> None:
    many = {str(k): 50.0 + k / 10 for k in range(MOST_FIGURES)}
    figures = {"task": "classify", "by_label": {"yes": 40.0, **many, "2": 20.0}, "label_metric": "F1"}
    page = rewritten(run, tmp_path / "run", figures, {})
    cells = [attributes for attributes in page.of("td") if (attributes.get("style") or "").startswith("--share: ")]
    assert len(cells) > 9
    assert "What was answered instead of what" in page.text
    assert "F1 of each label, in percent, the lowest first; 1 higher ones are left out." in page.text


def test_charts_are_the_same_bytes_for_the_same_data() -> None:
    def draw() -> str:
        return charts.curves({"a": ([1, 2, 3], [3.0, 2.0, 1.0])}, "loss")

    assert draw() == draw()
    assert charts.INK not in draw()
    assert "currentColor" in draw()

"""Model cards: what they say, that the Hub can read them, that hostile texts stay texts, that no weights count as
damaged for one.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import merge_lora
import train
from finetune.adapters.card_file import CARD_FILE, is_edited, write_card
from finetune.adapters.metadata import BASE_FINGERPRINT, BASE_QUANTIZATION, CONFIG_FILE, WEIGHTS_FILE, metadata_of
from finetune.report import model_card
from finetune.report.model_card import NOTICE, card, in_python, show_card, show_cards
from finetune.report.result_page import shortened
from finetune.report.subject import subject_of
from finetune.system.atomic import MANIFEST, damage
from finetune.system.terminal import visible
from finetune.training.result import Result
from tests.test_scripts import ROOT, base_with_scenes, overrides

HOSTILE = '--- "a": {b} [c](d) <b>x</b> | ``` ` \\ # $& \'*_\n---\n# x\n```\n<script>'
ONE_LINE = HOSTILE.replace("\n", "\\n")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_with_scenes(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def words(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration, to be trained."""
    output = tmp_path_factory.mktemp("runs") / "one"
    return [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output)]


@pytest.fixture(scope="module")
def trained(words: list[str]) -> Path:
    """A run that was trained, and not evaluated; as its card was then."""
    train.main(words)
    output = Path(words[-1].removeprefix("output="))
    shutil.copytree(output, output.parent / "trained")
    return output.parent / "trained"


@pytest.fixture(scope="module")
def run(words: list[str], trained: Path) -> Path:
    """The run, merged and evaluated."""
    output = Path(words[-1].removeprefix("output="))
    merge_lora.main([str(output), "--output", str(output / "merged"), "--dtype", "float32"])
    assert "## Scores" not in (output / "merged" / CARD_FILE).read_text()
    evaluate.main(words)
    return output


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@dataclasses.dataclass(frozen=True)
class Read:
    """A card as the Hub's library reads it."""

    data: ModelCardData
    text: str


def parse(text: str) -> Read:
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    return Read(card.data, card.text)


def read(directory: Path) -> Read:
    return parse((directory / CARD_FILE).read_text(encoding="utf-8"))


def test_a_run_that_was_not_evaluated_has_a_card_without_scores(trained: Path, base: Path) -> None:
    found = read(trained / "adapter")
    assert (found.data.library_name, found.data.pipeline_tag) == ("peft", "image-text-to-text")
    assert found.data.tags is not None
    assert {"lora", "paligemma", "transformers"} <= set(found.data.tags)
    assert found.data.eval_results is None
    assert found.data.base_model is None  # a directory is none that the Hub knows
    assert "## Scores" not in found.text
    assert metadata_of(trained / "adapter")[BASE_FINGERPRINT] in found.text
    assert "`answer en {question}`" in found.text
    assert "learning_rate: 0.01" in found.text


@pytest.mark.parametrize("arm", ["adapter", "merged"])
def test_evaluating_writes_the_scores_with_their_intervals_into_the_card(run: Path, arm: str) -> None:
    metrics = json.loads((run / "eval" / arm / "metrics.json").read_text())
    found = read(run / arm)
    assert found.data.eval_results is not None
    (result,) = found.data.eval_results
    assert result.metric_value == metrics["overall"]
    assert result.metric_args == {"interval_95": metrics["interval"], "questions": metrics["questions"]}
    assert result.dataset_name == "v2_OpenEnded_mscoco_val2014_questions.json"
    low, high = metrics["interval"]
    assert f"| {arm} | {metrics['overall']:.2f} | {low:.2f} to {high:.2f} |" in found.text
    assert "| base |" in found.text
    assert found.data.library_name == ("peft" if arm == "adapter" else "transformers")


def test_a_score_has_the_hubs_names_of_its_task_and_its_own_unit(copy: Path) -> None:
    file = copy / "eval/adapter/metrics.json"
    metrics = json.loads(file.read_text())
    for task, key, kind, title in (
        ("vqa", "accuracy", "visual-question-answering", "VQA accuracy, percent"),
        ("detect", "map", "object-detection", "mAP, percent"),
        ("caption", "cider", "image-to-text", "CIDEr-D, times 100"),
    ):
        metric, unit = title.split(", ")
        file.write_text(json.dumps(metrics | {"task": task, "metric": metric, "unit": unit}))
        found = parse(card(subject_of(copy / "adapter")))
        assert found.data.eval_results is not None
        (result,) = found.data.eval_results
        assert (result.task_type, result.metric_type, result.metric_name) == (kind, key, title)
        assert f"| {title} |" in found.text


def test_of_several_sources_each_has_a_score_of_its_own(copy: Path) -> None:
    """Their mean is no accuracy, and is not said to be one."""
    file = copy / "eval/adapter/metrics.json"
    metrics = json.loads(file.read_text())
    of_questions = {name: value for name, value in metrics.items() if name != "task"}  # as a score is written
    of_captions = of_questions | {"metric": "CIDEr-D", "unit": "times 100", "overall": 81.5, "interval": [80.0, 83.0]}
    mixture = {"by_source": {"ask": of_questions, "tell": of_captions}, "task": "mixture", "metric": "geometric mean"}
    file.write_text(json.dumps(metrics | mixture))
    found = parse(card(subject_of(copy / "adapter")))
    assert found.data.eval_results is not None
    said = [(one.task_type, one.metric_type, one.metric_value) for one in found.data.eval_results]
    assert said == [
        ("visual-question-answering", "accuracy", metrics["overall"]),
        ("image-to-text", "cider", 81.5),
    ]
    assert [one.dataset_name.split(": ")[-1] for one in found.data.eval_results] == ["ask", "tell"]


def test_scores_of_other_weights_are_not_in_the_card(copy: Path) -> None:
    """Trained on after the evaluation; and the base's, of other questions."""
    file = copy / "eval/base/metrics.json"
    metrics = json.loads(file.read_text())
    metrics["made_of"]["limit"] = 3
    file.write_text(json.dumps(metrics))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("OpenEnded_mscoco_val2014", "changed_since"))
    found = card(subject_of(copy / "adapter"))
    assert "changed_since" not in found.split("## How it was trained")[0]
    assert "| adapter |" in found
    assert "| base |" not in found
    tensors = load_file(copy / "adapter" / WEIGHTS_FILE)
    save_file(tensors, copy / "adapter" / WEIGHTS_FILE, metadata_of(copy / "adapter"))
    found = card(subject_of(copy / "adapter"))
    assert "| adapter |" not in found
    assert "model-index" not in found


def test_a_card_tells_no_path_of_this_machine(run: Path, base: Path) -> None:
    for arm in ("adapter", "merged"):
        text = (run / arm / CARD_FILE).read_text()
        assert "/tmp" not in text
        assert str(base.parent) not in text
        assert str(run.parent) not in text
        assert str(ROOT) not in text


def test_no_path_is_told_where_the_working_directory_is_the_root(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = card(subject_of(run / "adapter"))
    assert str(run.parent)[1:] not in found
    file = run / "adapter" / CONFIG_FILE
    assert str(Path(json.loads(file.read_text())["base_model_name_or_path"]).parent)[1:] not in found
    assert shortened("google/paligemma-3b-pt-224", str(run)) == "google/paligemma-3b-pt-224"


def test_the_output_of_a_configuration_has_a_name(run: Path) -> None:
    assert "output: one\n" in card(subject_of(run / "adapter"))


def test_the_title_is_of_the_run_also_where_its_path_looks_like_a_name_on_the_hub(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert "\n# run: adapter\n" in card(subject_of(Path("run/adapter")))
    assert "\n# mine\n" in card(subject_of(Path("run/adapter"), repo="me/mine"))


def test_a_metric_of_zero_is_a_metric(copy: Path) -> None:
    file = copy / "adapter" / WEIGHTS_FILE
    facts = json.dumps({"step": 2, "metric": "accuracy", "metric_value": 0.0})
    save_file(load_file(file), file, metadata_of(file.parent) | {"training": facts})
    assert "These are the weights of step 2, chosen by their accuracy of 0 in an evaluation during training." in card(
        subject_of(file.parent)
    )


@pytest.mark.parametrize("text", ["a \U0001f600", "\u202e\u2028\x1b\x7f", '\\"\n', "مرحبا\u200f"])
def test_a_text_in_the_code_of_a_card_is_that_text(text: str) -> None:
    written = in_python(text)
    assert ast.literal_eval(written) == text
    assert visible(written) == written


def test_an_adapter_whose_training_began_with_another_does_not_tell_its_path(run: Path) -> None:
    subject = subject_of(run / "adapter")
    assert subject.run is not None
    assert subject.run.config.lora is not None
    lora = dataclasses.replace(subject.run.config.lora, start_from="/somewhere/of/mine/last")
    config = subject.run.config.model_copy(update={"lora": lora})
    found = card(dataclasses.replace(subject, run=dataclasses.replace(subject.run, config=config)))
    assert "start_from: last" in found
    assert "/somewhere" not in found


def test_a_card_makes_no_weights_count_as_damaged(copy: Path) -> None:
    """Neither written, nor rewritten, nor edited, nor deleted."""
    for directory in (copy / "adapter", copy / "merged"):
        assert CARD_FILE not in json.loads((directory / MANIFEST).read_text())
        assert damage(directory) is None
        (directory / CARD_FILE).write_text("mine\n")
        assert damage(directory) is None
        (directory / CARD_FILE).unlink()
        assert damage(directory) is None


def test_an_edited_card_is_kept_and_that_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "adapter" / CARD_FILE
    assert not is_edited(copy / "adapter")
    edited = file.read_text().replace("# one: adapter", "# My adapter")
    file.write_text(edited)
    show_cards(copy)
    assert file.read_text() == edited
    assert "was edited: it stays as it is" in capsys.readouterr().out
    assert not is_edited(copy / "merged")
    file.write_bytes(b"\xff")
    assert is_edited(copy / "adapter")


def test_force_overwrites_a_card_that_was_written_here_and_no_other(run: Path, copy: Path) -> None:
    argv = [str(run / "adapter"), "--output", str(copy / "merged"), "--dtype", "float32", "--force"]
    merge_lora.main(argv)
    assert "## Scores" not in (copy / "merged" / CARD_FILE).read_text()
    (copy / "merged" / CARD_FILE).write_text("mine\n")
    with pytest.raises(ValueError, match=r"holds README\.md, which was not written with it"):
        merge_lora.main(argv)


def test_what_goes_wrong_with_a_card_ends_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "header", lambda subject: 1 / 0)
    show_card(copy / "adapter")
    assert "could not be written (ZeroDivisionError: division by zero)" in " ".join(capsys.readouterr().out.split())


def test_hostile_texts_stay_texts(copy: Path, tmp_path: Path) -> None:
    """In the header, in Markdown and in blocks of code: of the run's name, the prompt, a file and the answer types."""
    hostile_run = tmp_path / HOSTILE.replace("/", "|")
    copy.rename(hostile_run)
    prompt = ONE_LINE + "{question}"
    text = (hostile_run / "config.yaml").read_text()
    text = text.replace("prompt: answer en {question}", f"prompt: {json.dumps(prompt)}")
    text = re.sub(r"questions: \S*val2014_questions.json", lambda _: f"questions: {json.dumps(HOSTILE)}", text)
    (hostile_run / "config.yaml").write_text(text)
    file = hostile_run / "adapter" / WEIGHTS_FILE
    facts = json.dumps({"prompt": prompt, "step": 2, "metric": HOSTILE, "metric_value": 3.0})
    save_file(load_file(file), file, metadata_of(file.parent) | {"training": facts})
    metrics = json.loads((hostile_run / "eval/adapter/metrics.json").read_text())
    metrics |= {"by_answer_type": {HOSTILE: 1.0}, "validation": Path(HOSTILE).name}
    for arm in ("adapter", "base"):
        (hostile_run / "eval" / arm / "metrics.json").write_text(json.dumps(metrics))
    assert write_card(file.parent, card(subject_of(file.parent)))
    found = read(file.parent)
    assert found.data.eval_results is not None
    assert found.data.model_name == f"{hostile_run.name}: adapter".replace("\n", "\\n")
    assert found.data.eval_results[0].dataset_name == Path(HOSTILE).name.replace("\n", "\\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(found.text)
    inside = [child for token in tokens for child in token.children or []]
    html = [token.content for token in [*tokens, *inside] if token.type.startswith("html")]
    assert len(html) == 1  # the mark
    assert "sha256" in html[0]
    headings = [token.content for before, token in pairwise(tokens) if "heading_o" in before.type]
    assert headings[1:] == ["Scores", "How to open it", "How it was trained", "Base", "Licence"]
    (row,) = [i for i, token in enumerate(tokens) if token.type == "thead_open"]
    cells = [token for token in tokens[row : row + 20] if token.type == "th_open"]
    assert len(cells) == 4
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    compile(blocks["python"], "card", "exec")
    texts = [token.content for token in inside if token.type == "code_inline"]
    assert prompt in texts


def test_the_code_of_a_card_answers(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its Python, run as it stands, beside the files it names: PEFT and transformers open what was trained. A base that
    was a directory elsewhere has a path to be filled in: its name alone may be another model's on the Hub.
    """
    (tmp_path / "PATH/TO").mkdir(parents=True)
    for name, target in (("PATH/TO/tiny", base), ("adapter", run / "adapter"), ("merged", run / "merged")):
        (tmp_path / name).symlink_to(target)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    answers = []
    for arm in ("adapter", "merged"):
        (block,) = re.findall(r"^```python\n(.*?)^```$", (run / arm / CARD_FILE).read_text(), re.M | re.S)
        said: list[str] = []
        exec(block, {"print": said.append})
        answers += said
    assert len(answers) == 2
    assert answers[0] == answers[1] != ""


def test_an_adapter_of_the_hubs_base_names_it(copy: Path) -> None:
    file = copy / "adapter" / CONFIG_FILE
    about = {"base_model_name_or_path": "google/paligemma-3b-pt-224", "revision": "bfloat16"}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    found = parse(card(subject_of(copy / "adapter", repo="me/mine")))
    assert found.data.base_model == "google/paligemma-3b-pt-224"
    assert (found.data.license, found.data["base_model_relation"]) == ("gemma", "adapter")
    assert "base_model:adapter:google/paligemma-3b-pt-224" in (found.data.tags or [])
    assert NOTICE in found.text
    assert '.from_pretrained("google/paligemma-3b-pt-224", revision="bfloat16", dtype=torch.float32)' in found.text
    assert 'PeftModel.from_pretrained(base, "me/mine")' in found.text
    assert "directory on the machine" not in found.text


def test_another_network_opens_in_the_toolkit_alone_and_its_card_says_so(base: Path, tmp_path: Path) -> None:
    words = [str(ROOT / "configs/quickstart.yaml"), *overrides(base, tmp_path / "run", "model.connector=pixel_shuffle")]
    words.append("lora.targets=[language.*]")
    train.main(words)
    merge_lora.main([str(tmp_path / "run"), "--output", str(tmp_path / "run/merged"), "--dtype", "float32"])
    for arm in ("adapter", "merged"):
        found = read(tmp_path / "run" / arm)
        assert found.data.library_name == "paligemma-lora"
        assert "It opens in paligemma-lora alone" in found.text
        assert "```python" not in found.text
        assert damage(tmp_path / "run" / arm) is None


def test_an_adapter_at_another_resolution_opens_in_peft_only_merged(base: Path, tmp_path: Path) -> None:
    """PEFT would put it on a base of the checkpoint's own resolution."""
    words = [str(ROOT / "configs/quickstart.yaml"), *overrides(base, tmp_path / "run", "image.size=84")]
    train.main(words)
    merge_lora.main([str(tmp_path / "run"), "--output", str(tmp_path / "run/merged"), "--dtype", "float32"])
    assert read(tmp_path / "run/adapter").data.library_name == "paligemma-lora"
    assert read(tmp_path / "run/merged").data.library_name == "transformers"


def test_a_network_that_was_trained_in_full_has_a_card_too(base: Path, tmp_path: Path) -> None:
    words = [str(ROOT / "configs/quickstart.yaml"), *overrides(base, tmp_path / "run", "lora=null")]
    train.main([*words, "data.prompt=asked {question}"])
    found = read(tmp_path / "run/model")
    assert found.data.library_name == "transformers"
    assert "fine-tuned in full" in found.text
    assert "`asked {question}`" in found.text
    assert 'text="<image>asked what is this?"' in found.text
    result = Result.read(tmp_path / "run")
    assert result is not None
    assert f"These are the weights of step {result.step:,}, chosen by their accuracy" in found.text


def test_prompts_that_the_examples_had_are_not_made_up(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    text = re.sub(r"  train:.*?(?=  validation:)", "  train:\n    jsonl: mine.jsonl\n", text, flags=re.S, count=1)
    (copy / "config.yaml").write_text(text)
    file = copy / "adapter" / WEIGHTS_FILE
    save_file(load_file(file), file, metadata_of(file.parent) | {"training": json.dumps({"step": 2})})
    found = card(subject_of(file.parent))
    assert "Trained on `mine.jsonl`" in found
    assert "The prompts stand in the training examples." in found
    assert 'text="<image>a prompt like those of the training examples"' in found
    assert "what is this?" not in found


def test_a_base_in_four_bits_is_told(copy: Path) -> None:
    file = copy / "adapter" / WEIGHTS_FILE
    said = "The decoder's weights were kept in NF4 while it was trained."
    assert said not in card(subject_of(file.parent))
    save_file(load_file(file), file, metadata_of(file.parent) | {BASE_QUANTIZATION: "nf4"})
    assert said in card(subject_of(file.parent))


def test_what_is_neither_an_adapter_nor_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"holds neither {CONFIG_FILE} nor config.json: expected a run, an adapter"):
        subject_of(tmp_path)

"""What a run does with the lengths of its texts: refused by name, planned, generated, stored and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

import evaluate
import merge_lora
import predict
import train
from data import Processor
from data.synthetic.scenes import write as write_scenes
from finetune.adapters.generation_config import DEFAULT_NEW_TOKENS
from finetune.adapters.metadata import training_facts
from model import PaliGemma
from model.generate import Generation

ROOT = Path(__file__).parents[2]
LONG = "circle " * 200


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, and scenes to ask about."""
    directory = tmp_path_factory.mktemp("base")
    shutil.copytree(ROOT / "assets/tiny-base", directory, dirs_exist_ok=True)
    for split, seed in (("train2014", 1), ("val2014", 2)):
        write_scenes(directory / "data", scenes=8, seed=seed, split=split)
    return directory


@pytest.fixture(scope="module")
def processor(base: Path) -> Processor:
    return Processor.from_pretrained(base)


def official(base: Path, split: str) -> dict[str, str]:
    return {
        "questions": f"{base}/data/v2_OpenEnded_mscoco_{split}_questions.json",
        "annotations": f"{base}/data/v2_mscoco_{split}_annotations.json",
        "images": f"{base}/data/images",
    }


def lines(base: Path, file: Path, *texts: tuple[str, Any]) -> str:
    """A file of examples, one image each; returns it as a source of a configuration."""
    images = sorted(path.name for path in (base / "data/images").iterdir())
    rows = [{"image": image, "prefix": p, "suffix": s} for image, (p, s) in zip(images, texts, strict=False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{{jsonl: {file}, images: {base}/data/images}}"


def configuration(base: Path, output: Path, source: str, validation: str = "null", *more: str) -> list[str]:
    evaluated = "null" if validation == "null" else "2"
    return [
        str(ROOT / "configs/quickstart.yaml"),
        f"model={{path: {base}, dtype: float32, device: cpu}}",
        f"data={{train: {source}, validation: {validation}, workers: 0}}",
        "train={max_steps: 2, batch_size: 4, micro_batch: 2, learning_rate: 1e-2, log_every: 1}",
        f"train.eval_every={evaluated}",
        "evaluation={count: 4, batch_size: 4}",
        f"output={output}",
        *more,
    ]


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the scenes' questions under another prompt than the usual one."""
    output = tmp_path_factory.mktemp("runs") / "run"
    sources = [json.dumps(official(base, split)) for split in ("train2014", "val2014")]
    train.main([*configuration(base, output, *sources), "data.prompt=tell en {question}"])
    return output


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(prompt tokens of the longest row, max_new_tokens) of every call that generates."""
    calls: list[tuple[int, int]] = []
    generate = PaliGemma.generate_scored

    def noting(self: PaliGemma, input_ids: torch.Tensor, **settings: Any) -> Generation:
        calls.append((input_ids.shape[1], settings["max_new_tokens"]))
        return generate(self, input_ids, **settings)

    monkeypatch.setattr(PaliGemma, "generate_scored", noting)
    return calls


# What does not fit.


def test_a_text_that_does_not_fit_is_named_before_anything_is_trained(
    base: Path, tmp_path: Path, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer of 200 words once left nothing of its prompt, and --check and --inspect did not see it."""
    texts = [("caption en", "a circle")] * 7 + [("caption en", LONG)]
    argv = configuration(base, tmp_path / "run", lines(base, tmp_path / "a.jsonl", *texts))
    needed = len(processor.prompt_ids("caption en")) + len(processor.answer_ids(LONG))
    for look in ([], ["--check"], ["--inspect"], ["--overfit", "2"]):
        with pytest.raises(ValueError, match=r"1 (of 8 records|records of data\.train) cannot be used") as refused:
            train.main([*argv, "data.max_text_tokens=128", *look])
        said = str(refused.value) + shown(capsys)
        assert f"8: its text needs {needed:,} tokens" in said, look
        assert "max_text_tokens is 128" in said
        assert not (tmp_path / "run").exists()
    train.main([*argv, "--check"])  # auto: what the data needs
    answer = len(processor.answer_ids(LONG))
    assert f"the longest text has {needed:,} tokens, the longest answer {answer:,}" in shown(capsys)


def test_a_text_that_does_not_fit_is_skipped_as_asked(
    base: Path, tmp_path: Path, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("caption en", "a circle")] * 7 + [("caption en", LONG)]
    source = lines(base, tmp_path / "a.jsonl", *texts)
    skip = ["data.max_text_tokens=128", "data.on_error=skip", "data.skip_at_most=0.2"]
    train.main([*configuration(base, tmp_path / "run", source, source), *skip])
    assert "1 records cannot be used, others take their places" in shown(capsys)
    for split in ("train", "validation"):
        (listed,) = (tmp_path / f"run/skipped_{split}.jsonl").read_text().splitlines()
        assert json.loads(listed)["id"] == "8"
    rest = len(processor.prompt_ids("caption en")) + len(processor.answer_ids("a circle"))
    assert training_facts(tmp_path / "run/adapter").max_text_tokens == rest


def test_answers_are_cut_where_that_was_asked_and_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("caption en", "a circle")] * 6 + [("caption en", LONG)] * 2
    argv = configuration(base, tmp_path / "run", lines(base, tmp_path / "a.jsonl", *texts))
    train.main([*argv, "data.max_text_tokens=50", "data.truncate_answers=true", "--inspect"])
    said = shown(capsys)
    assert "data.train: 2 records have an answer that is cut at data.max_text_tokens, by up to" in said
    assert "warning: nothing is cut: no prompt is ever cut, 2 answers lose up to" in said
    assert "pass: <eos>: every label ends in it" in said
    with pytest.raises(ValueError, match="answers are cut at max_text_tokens, which is auto: give it a number"):
        train.main([*argv, "data.truncate_answers=true", "--inspect"])


def test_a_special_token_within_a_text_is_an_error_that_names_the_record(base: Path, tmp_path: Path) -> None:
    for texts in (("what is <image>?", "a cat"), ("caption en", "a cat<eos>")):
        source = lines(base, tmp_path / "a.jsonl", ("caption en", "a circle"), texts)
        with pytest.raises(
            ValueError, match=r"2: the (prefix|suffix) .* holds the special token <(image|eos)>: remove"
        ):
            train.main(configuration(base, tmp_path / "run", source))
    validation = lines(base, tmp_path / "b.jsonl", ("a <eos>", "b"))
    config = [*configuration(base, tmp_path / "run", source, validation), "--arm", "base"]
    with pytest.raises(ValueError, match=r"1: the prefix .* holds the special token <eos>"):
        evaluate.main(config)


# What is generated.


def test_answers_may_get_as_long_as_the_longest_trained_one(
    base: Path, run: Path, processor: Processor, generated: list[tuple[int, int]]
) -> None:
    """Training's evaluation, evaluate.py in both forms and predict.py; stored beside the prompt."""
    annotations = json.loads(Path(official(base, "train2014")["annotations"]).read_text())["annotations"]
    answers = {answer["answer"] for annotation in annotations for answer in annotation["answers"]}
    longest = max(len(processor.answer_ids(answer)) for answer in answers)
    facts = training_facts(run / "adapter")
    assert (facts.prompt, facts.max_new_tokens) == ("tell en {question}", longest)
    questions = json.loads(Path(official(base, "train2014")["questions"]).read_text())["questions"]
    prompts = max(len(processor.prompt_ids(f"tell en {question['question']}")) for question in questions)
    assert facts.max_text_tokens is not None
    assert prompts + 1 < facts.max_text_tokens <= prompts + longest
    sources = [json.dumps(official(base, split)) for split in ("train2014", "val2014")]
    argv = [*configuration(base, run, *sources), "data.prompt=tell en {question}"]
    named = [word for name, value in official(base, "val2014").items() for word in (f"--{name}", value)]
    checkpoint = ["--model", str(base), "--adapter", str(run / "adapter"), "--device", "cpu", "--dtype", "float32"]
    image = str(next((base / "data/images").iterdir()))
    evaluate.main([*argv, "--limit", "2"])
    evaluate.main([*checkpoint, *named, "--limit", "2"])
    predict.main([*checkpoint, "--image", image, "--prompt", "caption en"])
    assert len(generated) >= 4
    assert {new for _, new in generated} == {longest}
    generated.clear()
    evaluate.main([*argv, "--limit", "2", "evaluation.max_new_tokens=2"])
    evaluate.main([*checkpoint, *named, "--limit", "2", "--max-new-tokens", "2"])
    predict.main([*checkpoint, "--image", image, "--prompt", "caption en", "--max-new-tokens", "2"])
    assert {new for _, new in generated} == {2}


def test_answers_without_an_end_are_counted(base: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the score, in metrics.json, in metrics.jsonl and by predict.py on stderr, apart from the answers."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_unfinished" in line for line in metrics)
    sources = [json.dumps(official(base, split)) for split in ("train2014", "val2014")]
    argv = [*configuration(base, run, *sources), "data.prompt=tell en {question}", "evaluation.max_new_tokens=1"]
    evaluate.main(argv)
    said = shown(capsys)
    written = json.loads((run / "eval/base/metrics.json").read_text())
    assert written["max_new_tokens"] == 1
    assert written["unfinished"] > 0
    count = f"{written['unfinished']:,} of {written['questions']:,} answers"
    assert f"base: {count} are longer than 1 tokens, and cut off" in said
    of_adapter = json.loads((run / "eval/adapter/metrics.json").read_text())["unfinished"]
    count = f"{of_adapter:,} of {written['questions']:,} answers did not end within 1 tokens and are cut off"
    assert of_adapter > 0
    assert f"adapter: {count}: if they should be longer, raise evaluation.max_new_tokens" in said
    image = str(next((base / "data/images").iterdir()))
    argv = ["--model", str(base), "--image", image, "--prompt", "caption en", "--dtype", "float32", "--device", "cpu"]
    predict.main([*argv, "--max-new-tokens", "2", "--format", "jsonl"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["finished"] is False
    assert "1 of 1 answers did not end within 2 tokens and are cut off" in captured.err
    predict.main([*argv, "--max-new-tokens", "60", "--format", "jsonl"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["finished"] is True
    assert "cut off" not in captured.err


def test_where_nothing_is_stored_the_limit_is_said(
    base: Path, generated: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((base / "data/images").iterdir()))
    argv = ["--model", str(base), "--image", image, "--dtype", "float32", "--device", "cpu"]
    predict.main([*argv, "--prompt", "caption en"])
    assert {new for _, new in generated} == {DEFAULT_NEW_TOKENS}
    assert f"at most {DEFAULT_NEW_TOKENS} tokens are generated; --max-new-tokens says otherwise" in shown(capsys)


def test_prompts_of_any_length_are_asked_in_full(
    base: Path, tmp_path: Path, processor: Processor, generated: list[tuple[int, int]]
) -> None:
    """predict.py and evaluate.py --model once cut them at 128 tokens. Their limit is the positions of the model."""
    prompt = "is it red? " * 80
    image = str(next((base / "data/images").iterdir()))
    argv = ["--model", str(base), "--image", image, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "1"]
    predict.main([*argv, "--prompt", prompt])
    assert generated == [(len(processor.encode(prompt)["input_ids"]), 1)]
    assert generated[0][0] > 400
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    shutil.copytree(base, tmp_path / "short")
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the 100 positions of the model leave 83 for it: shorten it"):
        predict.main(["--model", str(tmp_path / "short"), *argv[2:], "--prompt", prompt])


def test_a_merged_checkpoint_knows_how_long_answers_get(
    base: Path, run: Path, tmp_path: Path, generated: list[tuple[int, int]]
) -> None:
    """In its generation_config.json, which transformers reads too."""
    merge_lora.main([str(run / "adapter"), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    expected = training_facts(run / "adapter").max_new_tokens
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == expected
    image = str(next((base / "data/images").iterdir()))
    generated.clear()
    predict.main(["--model", str(tmp_path / "merged"), "--image", image, "--prompt", "x", "--device", "cpu"])
    assert {new for _, new in generated} == {expected}


def test_a_network_trained_in_full_knows_it_too(base: Path, tmp_path: Path, processor: Processor) -> None:
    source = lines(base, tmp_path / "a.jsonl", *[("caption en", "a red circle")] * 4)
    train.main([*configuration(base, tmp_path / "run", source), "lora=null"])
    expected = len(processor.answer_ids("a red circle"))
    assert GenerationConfig.from_pretrained(tmp_path / "run/model").max_new_tokens == expected


def test_questions_are_asked_with_the_prompt_that_was_trained(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [word for name, value in official(base, "val2014").items() for word in (f"--{name}", value)]
    argv = ["--model", str(base), *named, "--limit", "2", "--dtype", "float32", "--device", "cpu"]
    for case, (adapter, given, asked) in enumerate(
        (
            ([], [], "answer en {question}"),
            (["--adapter", str(run / "adapter")], [], "tell en {question}"),
            (["--adapter", str(run / "adapter")], ["--prompt", "ask {question}"], "ask {question}"),
        )
    ):
        capsys.readouterr()
        evaluate.main([*argv, *adapter, *given, "--output", str(tmp_path / str(case))])
        assert json.loads((tmp_path / str(case) / "metrics.json").read_text())["prompt"] == asked
        differs = "the adapter was trained with the prompt 'tell en {question}'; --prompt asks 'ask {question}'"
        assert (differs in shown(capsys)) == bool(given)


# What a text may be.


def test_a_leading_image_token_changes_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the adapter nor the answers; ten points were once lost by it. Said once, with a count."""
    captions = [json.loads(line) for line in (base / "data/captions_val2014.jsonl").read_text().splitlines()][:8]
    made = {}
    for name, leading in (("plain", ""), ("marked", "<image>")):
        rows = [{**row, "prefix": leading + row["prefix"]} for row in captions]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"{{jsonl: {file}, images: {base}/data}}"
        argv = configuration(base, tmp_path / name, source, source)
        train.main([*argv, "train.learning_rate=1e-5"])
        evaluate.main(argv)
        said = shown(capsys)
        assert said.count("8 prefixes begin with <image> or <bos>: taken off") == (3 if leading else 0)
        results = json.loads((tmp_path / name / "eval/adapter/results.json").read_text())
        score = json.loads((tmp_path / name / "eval/adapter/metrics.json").read_text())["overall"]
        made[name] = (load_file(tmp_path / name / "adapter/adapter_model.safetensors"), results, score)
    for key, tensor in made["plain"][0].items():
        assert torch.equal(made["marked"][0][key], tensor)
    assert made["plain"][1:] == made["marked"][1:]
    assert made["plain"][2] > 10  # the tiny base captions such scenes


def test_an_empty_answer_is_learned_and_scored(base: Path, tmp_path: Path) -> None:
    """Nothing to detect: <eos> alone is learned, and an empty answer is right. In lines and in official files."""
    source = lines(base, tmp_path / "a.jsonl", *[("detect cat", "")] * 8)
    argv = [*configuration(base, tmp_path / "run", source, source), "train.max_steps=12"]
    train.main(argv)
    evaluate.main(argv)
    before, after = (json.loads((tmp_path / f"run/eval/{arm}/metrics.json").read_text()) for arm in ("base", "adapter"))
    assert before["overall"] < 50
    assert (after["overall"], after["unfinished"]) == (100, 0)
    assert training_facts(tmp_path / "run/adapter").max_new_tokens == 1
    annotations = json.loads(Path(official(base, "train2014")["annotations"]).read_text())
    for annotation in annotations["annotations"]:
        annotation["answers"] = [answer | {"answer": ""} for answer in annotation["answers"]]
        annotation["multiple_choice_answer"] = ""
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    files = official(base, "train2014") | {"annotations": f"{tmp_path}/annotations.json"}
    argv = configuration(base, tmp_path / "vqa", json.dumps(files), json.dumps(files))
    train.main([*argv, "train.max_steps=12"])
    metrics = [json.loads(line) for line in (tmp_path / "vqa/metrics.jsonl").read_text().splitlines()]
    assert [line["eval_accuracy"] for line in metrics if "eval_accuracy" in line][-1] == 100
    assert all(line["eval_loss"] >= 0 for line in metrics if "eval_loss" in line)


# What is planned.


def test_the_plan_takes_the_lengths_of_the_data(
    base: Path, tmp_path: Path, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [("caption en", "a circle")] * 7 + [("caption en", "circle " * 60)]
    argv = configuration(base, tmp_path / "run", lines(base, tmp_path / "a.jsonl", *texts))
    train.main([*argv, "--dry-run"])
    rows = [len(processor.encode(*row)["input_ids"]) for row in texts]
    answer = len(processor.answer_ids("circle " * 60))
    assert f"rows of {max(rows)} tokens, answers of {answer} (the longest of the data)" in shown(capsys)
    train.main([*argv, "--dry-run", "data.train.jsonl=absent.jsonl", "data.max_text_tokens=77"])
    said = shown(capsys)
    assert "steps and lengths are not known, for the data cannot be read: data.train.jsonl: absent.jsonl" in said
    assert f"rows of {processor.num_image_tokens + 1 + 77} tokens, answers of 8 (assumed" in said

"""The model card of an adapter or a checkpoint, README.md in the form of the Hugging Face Hub (an adapter's as PEFT
writes them): what was trained on what, its scores, how to open it.

A card is made from what is on the disk: the directory itself and the run that it belongs to. It contains no absolute
path, and texts of a person's data mean nothing in its YAML header, its Markdown and its code but themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from finetune.adapters.card_file import CARD_FILE, write_card
from finetune.adapters.generation_config import DEFAULT_NEW_TOKENS, stored_max_new_tokens
from finetune.adapters.metadata import (
    BASE_FINGERPRINT,
    metadata_of,
    trained_on,
)
from finetune.config.strict_yaml import dump
from finetune.evaluation.tasks import TASKS
from finetune.report.markdown import code, code_word, fenced, plain
from finetune.report.result_page import public
from finetune.report.run_data import Arm
from finetune.report.subject import TOOLKIT, Subject, subject_of
from finetune.system.console import show
from finetune.system.terminal import UNSAFE, one_line

NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
TASK_TYPES = {"detect": "object-detection", "caption": "image-to-text"}  # the Hub's names, where they are others
IN_PEFT = """\
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

base = PaliGemmaForConditionalGeneration.from_pretrained({base}, dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, {name}).eval()
processor = AutoProcessor.from_pretrained({base})
"""
IN_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

model = PaliGemmaForConditionalGeneration.from_pretrained({name}, dtype="auto").eval()
processor = AutoProcessor.from_pretrained({name})
"""
ASKING = """
inputs = processor(images=Image.open("image.jpg"), text={text}, return_tensors="pt").to(model.dtype)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def show_card(directory: Path, adapter: Path | None = None) -> None:
    """Write the card of a directory. Its weights stand, whatever happens here: what goes wrong is said."""
    try:
        if not write_card(directory, card(subject_of(directory, adapter))):
            show(f"{directory / CARD_FILE} was edited: it stays as it is")
    except Exception as error:  # of any kind: a night of training is worth more than its card
        show(f"{directory / CARD_FILE} could not be written ({type(error).__name__}: {error})")


def show_cards(output: Path) -> None:
    """Write the cards of what is in a run's directory."""
    for name in ("adapter", "model", "merged"):
        if (output / name).is_dir():
            show_card(output / name)


def card(subject: Subject) -> str:
    """The text of a card."""
    sections = {
        "Scores": scores(subject),
        "How to open it": opening(subject),
        "How it was trained": training(subject),
        "Base": about_base(subject),
        "Licence": licence(subject),
    }
    body = [f"# {plain(title(subject))}", about(subject)]
    body += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return f"---\n{header(subject).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n\n"


def header(subject: Subject) -> ModelCardData:
    """The metadata that the Hub reads."""
    hub_base = subject.hub_base
    library = ("peft" if subject.is_adapter else "transformers") if subject.opens_elsewhere else TOOLKIT
    tags = ["paligemma", TOOLKIT]
    if subject.is_adapter:
        tags += ["lora", *(["transformers"] if library == "peft" else [])]
        tags += [f"base_model:adapter:{hub_base}"] if hub_base else []
    relation = "adapter" if subject.is_adapter else "finetune"
    results = evaluation_results(subject)
    return ModelCardData(
        base_model=hub_base,
        library_name=library,
        license="gemma" if subject.has_gemma_weights else None,
        pipeline_tag="image-text-to-text",
        tags=sorted(tags),
        model_name=one_line(title(subject)) if results else None,
        eval_results=results or None,
        base_model_relation=relation if hub_base else None,
    )


def evaluation_results(subject: Subject) -> list[EvalResult]:
    """The subject's own scores, for `model-index`: one, or of several sources one for each."""
    by_metric, found = {task.metric: task for task in TASKS.values()}, []
    for whole in (arm for name, arm in subject.arms.items() if name != "base"):
        for source, arm in (whole.by_source or {"": whole}).items():
            task = TASKS.get(arm.task) or by_metric.get(arm.metric, TASKS["vqa"])
            name = validation_name(subject, whole)
            result = EvalResult(
                task_type=TASK_TYPES.get(task.name, "visual-question-answering"),
                dataset_type="custom",
                dataset_name=one_line(f"{name}: {source}" if source else name),
                metric_type=task.key,
                metric_name=f"{arm.metric}, {arm.unit}",
                metric_value=arm.metrics["overall"],
                metric_args={"interval_95": list(arm.interval), "questions": arm.metrics["questions"]},
            )
            found.append(result)
    return found


def title(subject: Subject) -> str:
    if subject.repo:
        return subject.repo.split("/")[1]
    return f"{subject.run.name}: {subject.directory.name}" if subject.run else subject.directory.absolute().name


def about(subject: Subject) -> str:
    """What this is, what it was trained on, and which step was kept."""
    base = code(subject.shown_base)
    if subject.is_adapter:
        said = f"A LoRA adapter for PaliGemma ({base}), which answers questions about images."
    else:
        merged = "with a LoRA adapter merged into it" if subject.adapter else "fine-tuned in full"
        said = f"PaliGemma ({base}) {merged}. It answers questions about images."
    if subject.run:
        train = subject.run.config.train
        how = {"dpo": "on preference pairs (DPO) of ", "reward": "by rewards for its own answers (RLOO) to "}
        said += f" Trained {how.get(train.objective, 'on ')}{code(subject.run.config.data.title('train'))}"
        said += f", in steps of {train.batch_size:,} examples."
    step, value = subject.facts.step, subject.facts.metric_value
    if step is not None:
        said += f" These are the weights of step {step:,}"
        if subject.facts.metric and value is not None:
            said += f", chosen by their {plain(subject.facts.metric)} of {value:.4g} in an evaluation during training"
        said += "."
    return said


def scores(subject: Subject) -> str:
    """A table with intervals; "" where it was not evaluated."""
    arms = subject.arms
    if not arms:
        return ""
    arm = next(iter(arms.values()))
    first = arm.metrics
    types = sorted(first["by_answer_type"])
    rows = [[f"{arm.metric}, {arm.unit}", "overall", "95% interval", *map(plain, types)], ["---"] * (3 + len(types))]
    for name, arm in arms.items():
        by_type = (f"{arm.metrics['by_answer_type'].get(kind, 0.0):.2f}" for kind in types)
        rows.append([name, f"{arm.metrics['overall']:.2f}", "{:.2f} to {:.2f}".format(*arm.interval), *by_type])
    for name in first.get("by_source", {}):
        found = {key: of.by_source[name] for key, of in arms.items() if name in of.by_source}
        rows += [
            [
                f"{key}, {plain(name)}: {of.metric}, {of.unit}",
                f"{of.metrics['overall']:.2f}",
                "{:.2f} to {:.2f}".format(*of.interval),
            ]
            for key, of in found.items()
        ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = f"about {first['images']:,} images" if first["images"] else "without images"
    asked = f"{first['questions']:,} questions {about}"
    return f"{table}\n\nOn {asked} of {code(validation_name(subject, arm))}, answered greedily."


def validation_name(subject: Subject, arm: Arm) -> str:
    """The file of questions that an arm answered; by the configuration where its figures do not say."""
    title = subject.run.config.data.title("validation") if subject.run else ""
    return str(arm.metrics.get("validation") or title or "not named")


def opening(subject: Subject) -> str:
    """Code for transformers, with PEFT for an adapter, where they have this network; and the toolkit's command."""
    base, revision = subject.base
    model = f" --model {code_word(subject.base_to_open)}" if subject.is_adapter and base != subject.hub_base else ""
    option = "--adapter" if subject.is_adapter else "--model"
    prompt = code_word(example_prompt(subject))
    command = f"python predict.py {option} DIRECTORY{model} --image image.jpg --prompt {prompt}"
    here = f"In {TOOLKIT}, from a directory:\n\n{fenced('', command)}"
    if not subject.opens_elsewhere:
        return (
            f"It opens in {TOOLKIT} alone: its connector, resolution, tiles or padding are not those of the published "
            f"network, which PEFT and transformers build. {here}"
        )
    values = {
        "name": in_python(subject.name),
        "base": in_python(subject.base_to_open) + (f", revision={in_python(revision)}" if revision else ""),
        "dtype": subject.run.config.model.dtype if subject.run else "bfloat16",
    }
    asking = ASKING.format(text=in_python("<image>" + example_prompt(subject)), new_tokens=new_tokens(subject))
    loading = (IN_PEFT if subject.is_adapter else IN_TRANSFORMERS).format(**values)
    return fenced("python", loading + asking) + f"\n\n{here}"


def in_python(text: str) -> str:
    """A literal of Python for a text, on one line and with nothing hidden in it. json.dumps alone would write a
    character beyond U+FFFF as two halves, which Python does not join.
    """
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def example_prompt(subject: Subject) -> str:
    """A prompt worded as in training, where that is known; a placeholder where each example had its own."""
    if subject.facts.prompt is None and subject.run and not subject.run.config.data.prompt_of_all:
        return "a prompt like those of the training examples"
    return (subject.facts.prompt or "answer en {question}").replace("{question}", "what is this?")


def new_tokens(subject: Subject) -> int:
    return subject.facts.max_new_tokens or stored_max_new_tokens(subject.directory) or DEFAULT_NEW_TOKENS


def training(subject: Subject) -> str:
    """The prompt, the base's quantization, and the configuration."""
    said = []
    if subject.facts.prompt:
        said.append(f"The prompt of a question: {code(subject.facts.prompt)}.")
    elif subject.run and not subject.run.config.data.prompt_of_all:
        said.append("The prompts stand in the training examples.")
    if subject.adapter and (quantized := trained_on(subject.adapter)):
        said.append(f"The decoder's weights were kept in {quantized.upper()} while it was trained.")
    if subject.run:
        said.append(f"The configuration:\n\n{fenced('yaml', dump(public(subject.run.config)))}")
    return "\n\n".join(said)


def about_base(subject: Subject) -> str:
    """Which checkpoint it belongs to."""
    _, revision = subject.base
    said = code(subject.shown_base) + (f", revision {code(revision)}" if revision else "")
    if not subject.hub_base:
        said += ", a directory on the machine where it was trained"
    stored = metadata_of(subject.adapter).get(BASE_FINGERPRINT) if subject.adapter else None
    return f"{said}." + (f" Fingerprint of its weights: {code(stored)}." if stored else "")


def licence(subject: Subject) -> str:
    if not subject.has_gemma_weights:
        return "That of the base."
    return (
        f"{NOTICE}. They bind whoever uses this or passes it on, with the restrictions of their section 3.2: "
        "[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms)."
    )

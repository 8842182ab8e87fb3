"""Image + prompt -> answer. Every prompt is asked of every image; without --image each is asked as text alone.

    python predict.py --adapter runs/quickstart --image scene.jpg --prompt "answer en how many circles are there?"
    python predict.py --model assets/tiny-base --image *.jpg --prompt "caption en" --format jsonl
    python predict.py --adapter runs/quickstart --image photos/ other.png --prompt "caption en"
    python predict.py --adapter runs/mine --image photos/ --prompt "detect cat ; dog" --draw drawn
    python predict.py --adapter runs/mine --image photos/ --prompt "answer en is it raining?" --candidates yes_no.txt
    python predict.py --adapter runs/mine --prompt "the capital of France is"

The prompt goes to the network as it stands: `answer en {question}`, `caption en`, `detect {a} ; {b}`. A folder stands
for the image files in it, sorted by name: .jpg, .png, .webp and the other formats that can be opened; hidden files and
folders within are left out. An image that is given twice is asked about once. An image that cannot be used is named,
the others are answered, and the exit code is 2; with --format jsonl its lines have "error" instead of "answer" and
"finished". With --candidates FILE, which has one answer a line, the answer is the most likely one of these. --draw
saves each image under its name in a directory, with the boxes that all answers about it name; it replaces no file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import cli
from finetune.system.paths import argument, path_argument
from finetune.system.terminal import json_line, one_line, visible

if TYPE_CHECKING:
    from finetune.evaluation.answer import Answer


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    arguments.image = image_files(arguments.image or ())
    broken = broken_images(arguments.image)
    for reason in broken.values():
        print(visible(f"error: {reason}"), file=sys.stderr)
    if broken and len(broken) == len(arguments.image):
        for line in lines(pairs_of(arguments), {}, broken, arguments.format):
            print(line)
        raise ValueError("no image is left to ask about")
    drawings = drawing_paths([image for image in arguments.image if image not in broken], arguments.draw)
    ask(arguments, broken, drawings)
    if broken:
        raise ValueError(f"{len(broken)} of {len(arguments.image)} images could not be used, see above")


def ask(arguments: argparse.Namespace, broken: dict[str, str], drawings: dict[str, Path]) -> None:
    """Open the network, ask every prompt of every image that can be used, print the answers, and draw their boxes."""
    # Only now: --help does without torch, whose import takes seconds.
    from finetune.adapters.generation_config import max_new_tokens_of
    from finetune.adapters.locate import find_adapter, find_base
    from finetune.adapters.network import adapted_config
    from finetune.adapters.storage import load_adapter
    from finetune.evaluation.candidates import read_candidates
    from finetune.evaluation.evaluate import choose_answers, generate_answers, unfinished_note
    from finetune.lora.nf4 import open_base
    from finetune.system.device import pick_device, pick_dtype
    from finetune.training.examples import processor_of
    from model import fetch

    candidates = read_candidates(arguments.candidates) if arguments.candidates else []
    adapter = find_adapter(arguments.adapter) if arguments.adapter else None
    base, revision = arguments.model, arguments.revision
    if base is None:
        assert adapter is not None, "there is a model or an adapter"
        base, revision = find_base(adapter)
    device = pick_device(arguments.device)
    directory = fetch(base, revision)
    processor = processor_of(directory, adapted_config(directory, adapter))
    new_tokens, guessed = max_new_tokens_of(directory, adapter, arguments.max_new_tokens, "--max-new-tokens")
    if marked := sum(map(processor.is_marked, dict.fromkeys(arguments.prompt))):
        print(f"{marked} prompts begin with <image> or <bos>: taken off, for every row has them", file=sys.stderr)
    for prompt in arguments.prompt:
        processor.encode(
            prompt, image=bool(arguments.image)
        )  # one that is refused, before minutes are spent on opening a network
    for text in candidates:
        processor.answer_ids(text)
    quantization = cli.quantization(arguments.quantize, adapter)
    model = open_base(directory, pick_dtype(arguments.dtype, device), device, quantization)
    if adapter:
        load_adapter(model, adapter)
    records = pairs_of(arguments)
    usable = [record for record in records if record["image"] not in broken]
    if candidates:
        answers = choose_answers(model, processor, usable, candidates, arguments.batch_size)
    else:
        sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
        answers = generate_answers(model, processor, usable, new_tokens, arguments.batch_size, **sampling)
    for line in lines(records, answers, broken, arguments.format):
        print(line)
    if drawings:
        boxes = draw(drawings, records, answers, processor.image_form.aspect)
        said = f"images saved in {arguments.draw}: {len(drawings):,}, with boxes drawn on them: {boxes:,}"
        print(visible(said), file=sys.stderr)
    unfinished = sum(not answer.finished for answer in answers.values())
    cut_off = unfinished_note(unfinished, len(answers), new_tokens, "--max-new-tokens")
    for note in (None if candidates else guessed, cut_off):
        if note:
            print(note, file=sys.stderr)


def image_files(paths: Sequence[str]) -> list[str]:
    """The image files that files and folders stand for, in this order and each once.

    Raises:
        ValueError: a folder has no image.
    """
    from data.images import images_in

    files: dict[str, str] = {}
    for path in paths:
        for file in map(str, images_in(Path(path))) if Path(path).is_dir() else [path]:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def broken_images(paths: Sequence[str]) -> dict[str, str]:
    """The images that cannot be used, and why, before minutes are spent on opening a network."""
    from data.images import open_image

    broken = {}
    for path in paths:
        try:
            open_image(path)
        except ValueError as error:
            broken[path] = str(error)
    return broken


def drawing_paths(images: Sequence[str], directory: Path | None) -> dict[str, Path]:
    """Where each image is saved with its boxes, in a directory that is made: under its own name, with a number where
    another one has that too, and as PNG where its own format cannot be written.

    Raises:
        ValueError: a file of that name is there, which may be an image of a person's; the directory cannot be made.
    """
    from PIL import Image

    if directory is None:
        return {}
    writable = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.SAVE}
    paths: dict[str, Path] = {}
    for image in images:
        name = Path(image).name if Path(image).suffix.lower() in writable else f"{Path(image).name}.png"
        path, number = directory / name, 1
        while path in paths.values():
            number += 1
            path = directory / f"{Path(name).stem}-{number}{Path(name).suffix}"
        paths[image] = path
    if there := [str(path) for path in paths.values() if os.path.lexists(path)]:
        more = f" and {len(there) - 1} more" if there[1:] else ""
        raise ValueError(
            f"--draw would replace {there[0]}{more}: expected a directory without files of these names; choose another "
            "one, or delete them"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--draw {directory} cannot be made: {error.strerror}; choose another directory") from error
    return paths


def draw(paths: dict[str, Path], records: Sequence[dict[str, Any]], answers: dict[str, Answer], aspect: str) -> int:
    """Save each image with the boxes of all answers about it, and return how many boxes that were."""
    from data.boxes import boxes_in
    from data.drawing import draw_boxes
    from data.images import open_image

    drawn = 0
    for image, path in paths.items():
        opened = open_image(image)
        texts = [answers[record["id"]].text for record in records if record["image"] == image]
        boxes = [box for text in texts for box in boxes_in(text, opened.size, aspect)]
        draw_boxes(opened, boxes).save(path)
        drawn += len(boxes)
    return drawn


def pairs_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every image with every prompt, as records to answer, those of broken images too; without images every prompt."""
    prompts = dict.fromkeys(arguments.prompt)
    if not arguments.image:
        return [{"id": prompt, "image": None, "image_id": prompt, "prefix": prompt} for prompt in prompts]
    return [
        {"id": f"{image}\n{prompt}", "image": image, "image_id": image, "prefix": prompt}
        for image in arguments.image
        for prompt in prompts
    ]


def lines(
    records: Sequence[dict[str, Any]], answers: dict[str, Answer], broken: dict[str, str], form: str
) -> Iterator[str]:
    """What is printed, in the order of the records. Of broken images texts say nothing, JSON lines the reason."""
    for record in records:
        asked = {
            name: record[key] for name, key in (("image", "image"), ("prompt", "prefix")) if record[key] is not None
        }
        if record["image"] in broken:
            if form == "jsonl":
                yield json_line(asked | {"error": broken[record["image"]]}, sys.stdout)
            continue
        given = answers[record["id"]]
        if form == "jsonl":
            found = {"answer": given.text, "finished": given.finished, "confidence": round(given.confidence, 4)}
            listed = {"candidates": given.listed} if given.candidates else {}
            yield json_line(asked | found | listed, sys.stdout)
        elif len(answers) == 1:
            yield visible(given.text)
        else:
            yield "\t".join(map(one_line, (*asked.values(), given.text)))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments = build_parser().parse_args(argv)
    if arguments.model is None and arguments.adapter is None:
        raise ValueError("expected --model, a checkpoint; or --adapter, which names its base; or both")
    if not arguments.image and (marked := [prompt for prompt in arguments.prompt if "<image>" in prompt]):
        raise ValueError(
            f"--prompt {marked[0]!r:.200} has <image>, and there is none: give --image, or remove the mark"
        )
    if not arguments.image and arguments.draw:
        raise ValueError("--draw saves images, and there are none: give --image, or leave --draw out")
    if arguments.model is None and arguments.revision is not None:
        raise ValueError("--revision is of the Hub id that --model gives: give that too")
    usual = {"max_new_tokens": None, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    given = [name for name, value in usual.items() if getattr(arguments, name) != value]
    if arguments.candidates and given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--candidates takes no {named}: answers are chosen among those of the file")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = cli.script_parser("predict.py", __doc__)

    def option(name: str, help: str, **settings: Any) -> None:
        shown = " (default: %(default)s)" if "default" in settings else ""
        parser.add_argument(name, help=help + shown, **settings)

    option("--model", "checkpoint: a directory or a Hub id; without it, the base that the adapter names", type=argument)
    option("--revision", "branch, tag or commit of that Hub id")
    option("--adapter", "directory of an adapter on that checkpoint, or of a run", type=path_argument)
    option("--image", "image files, and folders of them; without it prompts are text alone", nargs="+", type=argument)
    option("--prompt", "prompts, each asked of every image", nargs="+", required=True)
    option(
        "--candidates",
        "file of the answers that are allowed, one a line: the most likely one is taken, instead of a generated text",
        type=path_argument,
    )
    option("--max-new-tokens", cli.NEW_TOKENS_HELP, type=cli.positive)
    option("--temperature", "0 takes the most likely token, higher values sample", type=float, default=0.0)
    option("--top-p", "sample from the most likely tokens of this probability", type=float, default=1.0)
    option("--seed", "of the sampling", type=int, default=0)
    option("--batch-size", "prompts at once on the device", type=cli.positive, default=8)
    option("--format", "text: tab-separated lines; jsonl: objects", choices=["text", "jsonl"], default="text")
    option("--draw", "directory to save each image in with the boxes of its answers", type=path_argument)
    option("--dtype", "of base weights and arithmetic", choices=list(cli.DTYPES), default="bfloat16")
    option("--quantize", cli.QUANTIZE_HELP, choices=["auto", "nf4", "none"], default="auto")
    option("--device", "auto, cpu, cuda, cuda:N or mps", default="auto")
    return parser


if __name__ == "__main__":
    cli.run(main)

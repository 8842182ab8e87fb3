"""Picture + prompt -> answer. Every prompt is asked of every picture.

    python predict.py --model assets/tiny-base --adapter runs/quickstart/adapter \\
        --image scene.jpg --prompt "answer en how many circles are there?"

The prompt goes to the network as it stands: `answer en {question}`, `caption en`, `detect {a} ; {b}`. A picture that
cannot be used is named, the others are answered, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from data import Processor
from data.images import open_image
from finetune import cli, load_adapter
from finetune.device import DTYPES, pick_device, pick_dtype
from finetune.evaluate import generate_answers
from finetune.quantize import open_base
from finetune.terminal import json_line, one_line, visible
from model import fetch


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    broken = broken_pictures(arguments.image)
    for reason in broken.values():
        print(visible(f"error: {reason}"), file=sys.stderr)
    if len(broken) == len(set(arguments.image)):
        raise ValueError("no picture is left to ask about")
    device = pick_device(arguments.device)
    directory = fetch(arguments.model, arguments.revision)
    kept = cli.quantization(arguments.quantize, arguments.adapter)
    model = open_base(directory, pick_dtype(arguments.dtype, device), device, kept)
    processor = Processor.from_pretrained(directory)
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
    records = [
        {"id": f"{image}\n{prompt}", "image": image, "image_id": image, "prefix": prompt}
        for image in dict.fromkeys(arguments.image)
        if image not in broken
        for prompt in dict.fromkeys(arguments.prompt)
    ]
    answers = generate_answers(
        model,
        processor,
        records,
        arguments.batch_size,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for line in lines(records, answers, arguments.format):
        print(line)
    if broken:
        raise ValueError(f"{len(broken)} of {len(set(arguments.image))} pictures could not be used, see above")


def broken_pictures(paths: Sequence[str]) -> dict[str, str]:
    """The pictures that cannot be used, and why, before minutes are spent on opening a network."""
    broken = {}
    for path in dict.fromkeys(paths):
        try:
            open_image(path)
        except ValueError as error:
            broken[path] = str(error)
    return broken


def lines(records: Sequence[dict[str, str]], answers: dict[str, str], form: str) -> Iterator[str]:
    for record in records:
        answer = answers[record["id"]]
        if form == "jsonl":
            facts = {"image": record["image"], "prompt": record["prefix"], "answer": answer}
            yield json_line(facts, sys.stdout)
        elif len(records) == 1:
            yield visible(answer)
        else:
            yield "\t".join(map(one_line, (record["image"], record["prefix"], answer)))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint: a directory or a Hub id")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--adapter", help="directory of an adapter on that checkpoint")
    parser.add_argument("--image", nargs="+", required=True, help="picture files")
    parser.add_argument("--prompt", nargs="+", required=True, help="prompts, each asked of every picture")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens of this mass")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--format", choices=["text", "jsonl"], default="text")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--quantize", choices=["auto", "nf4", "none"], default="auto", help=cli.QUANTIZE_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)

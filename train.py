"""YAML -> adapter: one run, described by one file.

python train.py configs/vqav2_8gb.yaml
python train.py configs/vqav2_8gb.yaml train.epochs=2 lora.rank=32
accelerate launch --multi_gpu train.py configs/vqav2_8gb.yaml

Before a long run: --dry-run says whether it fits, with --probe how long it takes here; --check looks at every image;
--inspect shows what is learned from, on a page too; --overfit 8 tries whether it learns at all. --help lists every key
of the file, with its meaning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finetune import cli
from finetune.config.describe import describe
from finetune.report.push import add_arguments
from finetune.system.paths import argument, path_argument


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)

    # Only now: --help does without torch, whose import takes seconds.
    import torch

    from finetune.config.load import load_config
    from finetune.preflight.check import check
    from finetune.preflight.dry_run import dry_run
    from finetune.preflight.overfit import overfit
    from finetune.report.inspection_page import inspect
    from finetune.report.push import push, requested
    from finetune.run import learn
    from finetune.system import distributed
    from finetune.system.device import pick_device
    from finetune.system.lock import locked
    from model import fetch

    config = load_config(arguments.config, arguments.overrides)
    if arguments.probe and not arguments.dry_run:
        raise ValueError("--probe times the steps that --dry-run plans: give both")
    if arguments.page is not None and not arguments.inspect:
        raise ValueError("--page says where --inspect writes what it shows: give both")
    looks = arguments.dry_run or arguments.check or arguments.inspect or arguments.overfit is not None
    # A look makes no use of the other processes, and --dry-run none of the device.
    distributed.init(torch.device("cpu") if looks else pick_device(config.model.device), can_shard=True)
    if distributed.count() > 1 and looks:
        raise ValueError(
            "--dry-run, --check, --inspect and --overfit look before a run, in one process: leave out the launcher"
        )
    if looks and arguments.push:
        raise ValueError("--push is of what is trained: leave it out with --dry-run, --check, --inspect and --overfit")
    if arguments.dry_run:
        dry_run(config, arguments.probe)
        return
    if arguments.check:
        check(config)
        return
    if arguments.overfit is not None:
        overfit(config, arguments.overfit)
        return
    fetch(config.model.path, config.model.revision, weights=False)  # a wrong name is said before anything else
    if arguments.inspect:
        inspect(config, arguments.page)
        return
    pushed = distributed.on_main(partial(requested, arguments, Path(config.output)))
    if pushed and config.lora and Path(config.model.path).is_dir():
        raise ValueError(
            f"--push: the adapter would name its base by a path of this machine, {config.model.path}: train from the "
            f"base's name on the Hub, or push it afterwards, {cli.CONSOLE} push {config.output} --repo {pushed.repo} "
            "--base OWNER/NAME"
        )
    with locked(Path(config.output, "run.lock"), Path(config.output), "training"):
        learn(config, [arguments.config, *arguments.overrides], arguments.resume, arguments.accept_changes)
    if pushed:
        distributed.on_main(partial(push, pushed))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.script_parser("train.py", __doc__, "Keys of the configuration:\n\n" + describe())
    parser.add_argument("config", metavar="CONFIG.yaml", type=argument, help="the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the file; values are YAML")
    parser.add_argument(
        "--resume",
        type=argument,
        default="auto",
        help="auto (default: resume where the run stopped), none, or a checkpoint",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume a run although the configuration leads to another result now",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="say what the run would take and whether it fits, by assumed lengths if there are no data, and stop",
    )
    instead.add_argument(
        "--check", action="store_true", help="decode every image, list every record that cannot be used, and stop"
    )
    instead.add_argument(
        "--inspect",
        action="store_true",
        help="show the first examples as the network sees them, also as a page; check them and the data; and stop. The "
        "exit code is 2 where they would ruin the training, 0 where there are warnings alone",
    )
    instead.add_argument(
        "--overfit", type=int, metavar="N", help="overfit the first N examples, say whether that works, and stop"
    )
    parser.add_argument(
        "--probe", action="store_true", help="with --dry-run: time a few steps on this device, with random weights"
    )
    add_arguments(parser, "the result")
    parser.add_argument(
        "--page",
        type=path_argument,
        metavar="FILE.html",
        help="with --inspect: where its page is written (default: OUTPUT/inspect.html)",
    )
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    cli.run(main)

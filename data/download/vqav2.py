"""Download VQAv2 from its official addresses, with only the images that a run needs.

    python -m data.download.vqav2 --output downloads/vqav2 --fraction 0.1 --seed 0 --validation 5000

    DIR/v2_OpenEnded_mscoco_{split}_questions.json      all questions and annotations of train2014 and val2014
    DIR/v2_mscoco_{split}_annotations.json
    DIR/{split}/COCO_{split}_{image_id:012d}.jpg        images of the selected questions

COCO's archives have 13.5 and 6.6 GB; only their directories and the selected images are downloaded. If the command is
interrupted, run it again: it resumes. The exit code is 0, 2 after an error or 130 after Ctrl-C. Not here: how questions
are selected (data/records.py, as for a configuration with the same fraction, count and seed), and how members of an
archive are downloaded (remote_zip.py).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data.download.remote_zip import ATTEMPTS, Archive, Member
from data.files import path_argument
from data.records import load_records
from data.script import run

SPLITS = {"train2014": "Train", "val2014": "Val"}  # in the names of images, and in those of VQAv2's archives
ANNOTATIONS_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"  # the links of visualqa.org/download.html
IMAGES_URL = "http://images.cocodataset.org/zips"  # not https: the server's certificate has another host name
CONNECTIONS = 16


def fetch(files: Sequence[Member], output: Path, verify: bool, what: str) -> None:
    """Download the files that are missing, several at once.

    Args:
        verify: compare the CRC-32 of existing files; without it their size only.
        what: the files, for messages.

    Raises:
        ValueError: the disk has too little room, or some files still differ from their CRC-32 after all attempts.
    """
    missing = [file for file in files if not file.is_complete(verify)]
    needed, free = sum(file.info.file_size for file in missing), shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"{output} has room for {free:,} bytes, but the {what} to download have {needed:,}; free some disk space, "
            "choose a smaller --fraction, or choose another --output"
        )
    for directory in {file.target.parent for file in missing}:
        directory.mkdir(exist_ok=True)
    columns = (
        TextColumn(what, markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar as progress, ThreadPoolExecutor(CONNECTIONS) as pool:
        advance = partial(progress.advance, progress.add_task(what, total=sum(one.end - one.begin for one in missing)))
        running = {pool.submit(file.fetch, advance): file for file in missing}
        try:
            broken = sorted(running[done].target.name for done in as_completed(running) if not done.result())
        except BaseException:  # Ctrl-C, too: cancel the downloads that wait, stop those that run
            for file in missing:
                file.archive.file.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    if broken:
        some = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        raise ValueError(
            f"{len(broken):,} of the {what} differ from size or CRC-32 in the archive after {ATTEMPTS} attempts: "
            f"{some}; run the same command again, or give another address"
        )


def fetch_vqav2(
    output: Path,
    annotations_url: str,
    images_url: str,
    train: Mapping[str, Any],
    val: Mapping[str, Any],
    verify: bool,
) -> str:
    """Download everything into `output`, and return a summary. train, val: arguments of `load_records`."""
    output.mkdir(parents=True, exist_ok=True)
    texts = []
    for split, name in SPLITS.items():
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            archive = Archive(f"{annotations_url}/v2_{kind}_{name}_mscoco.zip")
            texts.append(archive.member(f"v2_{file.format(split)}.json", output))
    fetch(texts, output, verify, "questions and annotations")
    images = []
    for split, selection in zip(SPLITS, (train, val), strict=True):
        names = selected_images(output / f"v2_OpenEnded_mscoco_{split}_questions.json", selection)
        archive = Archive(f"{images_url}/{split}.zip")
        images += [archive.member(name, output / split) for name in names]
    fetch(images, output, verify, "images")
    size = sum(file.info.file_size for file in (*texts, *images))
    return f"{len(images):,} images with their questions and annotations, {size:,} bytes, are in {output}"


def selected_images(questions: Path, selection: Mapping[str, Any]) -> list[str]:
    """File names of the images of the selected questions."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        images = load_records(questions=questions, cache_dir=cache, **selection)["image"]
        return sorted({image["path"] for image in images})


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.download.vqav2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=path_argument, default=Path("downloads/vqav2"), help="default: %(default)s")
    parser.add_argument("--fraction", type=float, default=0.1, help="data.train.fraction (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=5000, help="data.validation.count (default: %(default)s)")
    parser.add_argument("--sample-by", choices=["image", "question"], default="image", help="as in the configuration")
    parser.add_argument("--seed", type=int, default=0, help="train.seed (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare the CRC-32 of existing files, too")
    parser.add_argument("--annotations-url", default=ANNOTATIONS_URL, help="default: %(default)s")
    parser.add_argument("--images-url", default=IMAGES_URL, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    shared = {"sample_by": given.sample_by, "seed": given.seed}
    train, val = {"fraction": given.fraction, **shared}, {"count": given.validation, **shared}
    try:
        print(fetch_vqav2(given.output, given.annotations_url, given.images_url, train, val, given.verify))
    except OSError as error:  # of the disk: remote_zip.py has handled those of the network
        raise ValueError(
            f"{given.output} cannot be written ({error}); free some disk space, or choose another --output"
        ) from error


if __name__ == "__main__":
    sys.exit(run(main))

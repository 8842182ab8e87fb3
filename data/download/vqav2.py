"""VQAv2 from its official addresses, with no more pictures than a run looks at.

    python -m data.download.vqav2 --output downloads/vqav2 --fraction 0.1 --seed 0 --validation 5000

    DIR/v2_OpenEnded_mscoco_{split}_questions.json      questions and annotations of train2014 and val2014, whole
    DIR/v2_mscoco_{split}_annotations.json
    DIR/{split}/COCO_{split}_{image_id:012d}.jpg        pictures of the chosen questions

COCO's archives are 13.5 and 6.6 GB; of these only the directory and the chosen pictures cross the network. Killed at
any moment, the same command goes on. Not here: the choice, which is that of a configuration with the same fraction,
count and seed (data/records.py), and how members are fetched (remote_zip.py).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data.download.remote_zip import ATTEMPTS, Archive, Member
from data.records import load_records

SPLITS = {"train2014": "Train", "val2014": "Val"}  # as pictures are named and as the archives of questions are
ANNOTATIONS_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"  # the links of visualqa.org/download.html
PICTURES_URL = "http://images.cocodataset.org/zips"  # over https, its certificate is that of another name
CONNECTIONS = 16


def fetch(files: Sequence[Member], output: Path, verify: bool, what: str) -> None:
    """Fetch those that are not there, several at once. ValueError names those whose CRC-32 is wrong again and again."""
    missing = [file for file in files if not file.is_there(verify)]
    needed, free = sum(file.info.file_size for file in missing), shutil.disk_usage(output).free
    if needed > free:
        other = "make room, choose a smaller --fraction, or another --output"
        raise ValueError(f"{output} has room for {free:,} bytes, the {what} to fetch are {needed:,}; {other}")
    for directory in {file.target.parent for file in missing}:
        directory.mkdir(exist_ok=True)
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(CONNECTIONS) as pool:
        advance = partial(progress.advance, progress.add_task(what, total=sum(one.end - one.begin for one in missing)))
        running = {pool.submit(file.fetch, advance): file for file in missing}
        try:
            broken = sorted(running[done].target.name for done in as_completed(running) if not done.result())
        except BaseException:  # Ctrl-C too: what waits is dropped, what is on its way stops
            for file in missing:
                file.archive.file.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    if broken:
        some = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        fault = f"differ from size or CRC-32 in the archive after {ATTEMPTS} attempts: {some}"
        other = "start the same command again, or give another address"
        raise ValueError(f"{len(broken):,} of the {what} {fault}; {other}")


def fetch_vqav2(
    output: Path,
    annotations_url: str,
    pictures_url: str,
    train: Mapping[str, Any],
    val: Mapping[str, Any],
    verify: bool,
) -> None:
    """Fetch everything into `output`; `train` and `val` are arguments of `load_records` that choose the questions."""
    output.mkdir(parents=True, exist_ok=True)
    texts = []
    for split, name in SPLITS.items():
        for kind, file in (("Questions", "OpenEnded_mscoco_{}_questions"), ("Annotations", "mscoco_{}_annotations")):
            archive = Archive(f"{annotations_url}/v2_{kind}_{name}_mscoco.zip")
            texts.append(archive.member(f"v2_{file.format(split)}.json", output))
    fetch(texts, output, verify, "questions and annotations")
    pictures = []
    for split, choice in zip(SPLITS, (train, val), strict=True):
        names = chosen_pictures(output / f"v2_OpenEnded_mscoco_{split}_questions.json", choice)
        archive = Archive(f"{pictures_url}/{split}.zip")
        pictures += [archive.member(name, output / split) for name in names]
    fetch(pictures, output, verify, "pictures")
    size = sum(file.info.file_size for file in (*texts, *pictures))
    print(f"{len(pictures):,} pictures with their questions and annotations, {size:,} bytes, are in {output}")


def chosen_pictures(questions: Path, choice: Mapping[str, Any]) -> list[str]:
    """File names of the pictures that the chosen questions are about."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        images = load_records(questions=questions, cache_dir=cache, **choice)["image"]
        return sorted({image["path"] for image in images})


def path_argument(text: str) -> Path:
    """A path in which `~`, `$NAME` and `${NAME}` are expanded; `$$` is a dollar sign."""
    try:
        return Path(Template(text).substitute(os.environ)).expanduser()
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the environment variable {error} is not set") from error
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; write $$ for a dollar sign, ./~ for a tilde") from error


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.download.vqav2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=path_argument, default=Path("downloads/vqav2"), help="default: %(default)s")
    parser.add_argument("--fraction", type=float, default=0.1, help="data.train.fraction (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=5000, help="data.validation.count (default: %(default)s)")
    parser.add_argument("--sample-by", choices=["image", "question"], default="image", help="as in the configuration")
    parser.add_argument("--seed", type=int, default=0, help="train.seed (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="read what is there already, and compare its CRC-32")
    parser.add_argument("--annotations-url", default=ANNOTATIONS_URL, help="default: %(default)s")
    parser.add_argument("--pictures-url", default=PICTURES_URL, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    shared = {"sample_by": given.sample_by, "seed": given.seed}
    train, val = {"fraction": given.fraction, **shared}, {"count": given.validation, **shared}
    try:
        fetch_vqav2(given.output, given.annotations_url, given.pictures_url, train, val, given.verify)
    except OSError as error:  # of the disk: those of the network have been dealt with
        raise ValueError(f"{given.output} cannot be written ({error}); make room or give another --output") from error


def run() -> int:
    """Call `main` with the command line, and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may have what the encoding lacks
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())

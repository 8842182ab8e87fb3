"""A run reads no pickle, asks no network and keeps no secret: training, merging, evaluating, watched from within."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_scripts import ROOT, base, overrides  # noqa: F401 (base is a fixture)

WATCHED = """
import sys

def forbid(event, arguments):
    if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("FORBIDDEN", event, arguments, file=sys.stderr, flush=True)

sys.addaudithook(forbid)
import evaluate, merge_lora, predict, train

output, image, *run = sys.argv[1:]
train.main(run)
merge_lora.main([output + "/adapter", "--output", output + "/merged", "--dtype", "float32"])
evaluate.main(run)
predict.main(["--model", output + "/merged", "--image", image, "--prompt", "caption en", "--device", "cpu"])
"""
SECRETS = {
    "HF_TOKEN": "hf_a1b2c3secret",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "5ecret12",
    "AWS_SECRET": "aws5ecret",
}


@pytest.fixture(scope="module")
def watched(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:  # noqa: F811
    """The directory of a run through all scripts in a process of its own, and what it printed."""
    output = tmp_path_factory.mktemp("watched") / "run"
    image = next((base / "data/images").iterdir())
    run = [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output)]
    # Without the setting that keeps the Hub's library off the network: nothing asks for it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_", "WANDB_"))}
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED, str(output), str(image), *run],
        cwd=ROOT,
        env=environment | SECRETS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return output, ran.stdout + ran.stderr


def test_nothing_is_unpickled_and_nobody_is_asked(watched: tuple[Path, str]) -> None:
    assert re.findall(r"FORBIDDEN.*", watched[1]) == []


def test_no_secret_is_written_or_shown(watched: tuple[Path, str]) -> None:
    output, shown = watched
    written = [path for path in output.rglob("*") if path.is_file()]
    assert len(written) > 10
    for secret in SECRETS.values():
        assert secret not in shown
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_the_watch_would_see_it(tmp_path: Path) -> None:
    hook = WATCHED.split("import evaluate")[0]
    code = f"{hook}\nimport pickle, collections\npickle.loads(pickle.dumps(collections.OrderedDict(a=1)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FORBIDDEN pickle.find_class" in ran.stderr

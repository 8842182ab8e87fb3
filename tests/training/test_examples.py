"""A path of the examples that is wrong is said before anything else: at once, by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.evaluation.run import evaluate_run
from finetune.run import learn
from tests.test_scripts import base_with_scenes, files, overrides

CONFIG = "configs/quickstart.yaml"


def test_a_wrong_path_is_said_before_a_run_is_compared_with_the_one_that_began(tmp_path: Path) -> None:
    base = base_with_scenes(tmp_path / "base")
    words = overrides(base, tmp_path / "run")
    learn(load_config(CONFIG, words), [])
    images = f"{files(base, 'val2014')['images']}"
    wrong = [*words, f"data.train.questions={base}/elsewhere", f"data.validation.images={images}s"]
    with pytest.raises(ValueError, match="does not exist") as raised:
        learn(load_config(CONFIG, wrong), [])
    assert str(raised.value).splitlines() == [
        f"data.train.questions: {base}/elsewhere does not exist",
        f"data.validation.images: {images}s does not exist; did you mean {images}?",
    ]
    with pytest.raises(ValueError, match=r"^data\.validation\.images: .* does not exist; did you mean .*\?$"):
        evaluate_run(load_config(CONFIG, wrong), [CONFIG])

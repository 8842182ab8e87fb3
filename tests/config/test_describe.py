"""Help and the schema for editors name every key."""

import json
import re
from pathlib import Path

import pytest

from finetune.config.__main__ import main
from finetune.config.describe import describe, json_schema
from finetune.config.load import load_config
from tests.config.minimal import keys


def test_the_help_names_every_key_with_type_default_and_meaning(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["model.connector=mlp", "stages=[{name: align, epochs: 1}]"]
    config = load_config(path, ["data.validation.jsonl=v.jsonl", *stages])
    main([])
    printed = capsys.readouterr().out
    assert printed == describe() + "\n"
    listed = re.findall(r"^(\S+): ", printed, flags=re.MULTILINE)
    assert sorted(listed) == sorted(keys(config.model_dump(mode="json")))
    assert len(re.findall(r"^\S+: .+\n {4}\S", printed, flags=re.MULTILINE)) == len(listed)
    assert "train.learning_rate: number > 0 = 0.0001\n    Peak learning rate" in printed
    assert "model.path: text (required)\n    Checkpoint" in printed
    assert "data.validation.count: whole number >= 1 or null = null\n" in printed
    assert "stages.N.max_steps: whole number >= 1 or null = null\n    Steps; this or epochs." in printed
    assert "stages.N.name: text matching ^[A-Za-z0-9_-]+$ (required)\n    Of its directory" in printed
    assert "lora.rank: whole number = 16\n    Rank" in printed
    assert "lora: section or null\n    The adapter; null: all parameters" in printed


def test_the_schema_for_editors_knows_every_key_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, field in section["properties"].items():
            assert "$ref" in field or field["description"], name
    assert schema["$defs"]["TrainConfig"]["properties"]["schedule"]["enum"] == ["cosine", "linear", "constant"]


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(SystemExit):
        main(["--scheme"])

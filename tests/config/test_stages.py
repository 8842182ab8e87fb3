"""`stages`, connector and image keys of a configuration: the runs they stand for, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from finetune import LoRAConfig, inject_lora, save_adapter
from finetune.config.load import ConfigError, dump_config, load_config
from finetune.config.schema import RunConfig
from finetune.config.stages import connector_start, runs_of
from finetune.lora.protocol import trained_parameters
from finetune.training.resume import differences
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert
from tests.test_scripts import ROOT, base, overrides  # noqa: F401 (base is a fixture)

STAGES = ["model.connector=resampler", "stages=[{name: align, max_steps: 5}, {name: more, epochs: 2}]"]


def test_each_stage_trains_the_connector_alone_and_starts_with_the_one_before(path: Path) -> None:
    more = ["connector.learning_rate=3e-3", "connector.start_from=there", "stages.1.learning_rate=1e-5", "lora.rank=3"]
    config = load_config(path, [*STAGES, *more])
    align, second, run = runs_of(config)
    assert run == config
    assert [one.output for one in (align, second, run)] == ["runs/one/stages/align", "runs/one/stages/more", "runs/one"]
    starts = [connector_start(one) for one in (align, second, run)]
    assert starts == ["there", "runs/one/stages/align", "runs/one/stages/more"]
    lengths = [(one.train.max_steps, one.train.epochs) for one in (align, second, run)]
    assert lengths == [(5, None), (None, 2), (100, None)]
    assert [one.connector.learning_rate for one in (align, second, run)] == [3e-3, 1e-5, 3e-3]
    for stage in (align, second):
        assert stage.lora == LoRAConfig(targets=(), modules_to_save=("connector.*",))
        own = {"lora", "connector", "train", "output", "stages"}
        assert stage.model_dump(exclude=own) == config.model_dump(exclude=own)
        assert stage.stages == ()
    assert run.lora is not None
    assert (run.lora.rank, run.lora.modules_to_save) == (3, ("connector.*",))


def test_without_stages_a_configuration_is_one_run(path: Path) -> None:
    config = load_config(path, ["model.connector=mlp", "connector.start_from=there"])
    assert runs_of(config) == [config]
    assert connector_start(config) == "there"
    assert connector_start(load_config(path)) is None


def test_what_is_written_is_read_again(path: Path) -> None:
    config = load_config(path, [*STAGES, "image={size: 448, tiles: 4, aspect: pad}"])
    path.write_text(dump_config(config))
    assert load_config(path) == config
    for stage in runs_of(config):
        path.write_text(dump_config(stage))
        assert load_config(path) == stage


def test_keys_within_a_list_are_overridden_by_their_position(path: Path) -> None:
    config = load_config(path, [*STAGES, "stages.0.max_steps=7", "stages.1={name: other, max_steps: 2}"])
    assert [(stage.name, stage.max_steps, stage.epochs) for stage in config.stages] == [
        ("align", 7, None),
        ("other", 2, None),
    ]


def test_differences_name_the_stage_and_its_key(path: Path) -> None:
    before = load_config(path, STAGES)
    now = load_config(path, [*STAGES, "stages.0.max_steps=6", "stages.1.name=third"])
    assert differences(before, now) == {
        "result": ["stages.0.max_steps: was 5, is 6", "stages.1.name: was more, is third"]
    }
    fewer = load_config(path, [*STAGES, "stages=[{name: align, max_steps: 5}]"])
    assert "stages.1.name: was more, is (absent)" in differences(before, fewer)["result"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.0.max_step=3"],
            r"override 'stages\.0\.max_step=3': stages\.0\.max_step: .* did you mean max_steps\?",
        ),
        (["stages.1.zzz=3"], r"stages\.1\.zzz: unknown key; expected name, epochs, max_steps, learning_rate"),
        (["stages.1.lr=3"], r"stages\.1\.lr: unknown key; did you mean stages\.1\.learning_rate\?"),
        (
            ["stages.0.max_steps=0"],
            r"override 'stages\.0\.max_steps=0': stages\.0\.max_steps: got 0; expected whole number >=",
        ),
        (["stages.0.epochs=1"], r"stages\.0\.max_steps: got 5 with epochs 1\.0; expected either max_steps or epochs"),
        (["stages.1.epochs=null"], r"stages\.1\.max_steps: expected either max_steps or epochs, which say how long"),
        (["stages.1.name=a b"], r"stages\.1\.name: got \"a b\"; expected text matching"),
        (["stages.1.name=align"], r"stages\.1\.name: got align, which stages\.0 is called; expected a name of its own"),
        (["stages=[{max_steps: 3}]"], r"stages\.0\.name: required, but not given: Of its directory"),
        (["stages=align"], r"stages: got \"align\"; expected list of section"),
        (
            ["stages.2.name=x"],
            r"override 'stages\.2\.name=x': stages is a list of 2, and has no '2'; expected a number below 2",
        ),
        (["stages.name=x"], r"stages is a list of 2, and has no 'name'"),
        (
            ["model.connector=null"],
            r"stages: got align, more; stages train the connector .* model\.connector names none: name it",
        ),
        (["lora=null"], r"stages: got align, more; .* lora: null trains all of it: leave stages out"),
        (
            ["model.connector=dense_dcl"],
            r"model\.connector: got \"dense_dcl\"; expected linear \| .*; did you mean dense_dci\?",
        ),
        (
            ["stages=[]", "model.connector=null", "connector.latents=3"],
            r"connector\.latents: got 3, .* names none: name it",
        ),
        (
            ["stages=[]", "model.connector=null", "connector.start=random"],
            r"connector\.start: got random, which is how",
        ),
        (
            ["stages=[]", "model.connector=null", "connector.learning_rate=1e-3"],
            r"override 'connector\S+=1e-3': connector\.learning_rate: got 0\.001, and nothing of the connector is",
        ),
        (["connector.factor=1"], r"connector\.factor: got 1; expected whole number >= 2"),
        (["image.tiles=2"], r"image\.tiles: got 2; expected "),
        (["image.aspect=crop"], r"image\.aspect: got \"crop\"; expected squash \| pad or null"),
    ],
)
def test_what_is_wrong_is_named_where_it_stands(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, [*STAGES, *overrides])


def test_lines_of_a_file_are_named_within_a_list(path: Path) -> None:
    path.write_text(path.read_text() + "stages:\n- name: align\n  max_steps: 5\n- name: more\n  epoch: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:10: stages\.1\.epoch: unknown key; did you mean"):
        load_config(path, ["model.connector=mlp"])


@pytest.mark.parametrize("lora", ["{targets: [connector.*]}", "{modules_to_save: [connector.linear]}", "null"])
def test_a_rate_of_the_connector_goes_with_whatever_trains_it(path: Path, lora: str) -> None:
    assert load_config(path, [f"lora={lora}", "connector.learning_rate=1e-3"]).connector.learning_rate == 1e-3


# An adapter of another network, to start from.


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Of several networks, by name."""
    directory = tmp_path_factory.mktemp("adapters")
    networks: dict[str, dict[str, Any]] = {
        "resampler": {
            "connector": ConnectorConfig("resampler", latents=3, depth=1, seed=9),
            "tiles": 4,
            "aspect": "pad",
        },
        "dense_dci": {"connector": ConnectorConfig("dense_dci")},
        "plain": {},
        "large": {"image_size": 84},
    }
    for name, changes in networks.items():
        model = PaliGemma.from_pretrained(base, dtype=torch.float32)
        convert(model, changed(model.config, **changes))
        full = ("connector.*",) if "connector" in changes else ()
        inject_lora(model, LoRAConfig(rank=3, targets=("language.q_proj",), modules_to_save=full))
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model, directory / name, str(base))
    return directory


def arguments(base: Path, output: Path, *more: str) -> list[str]:  # noqa: F811
    """A run of the quickstart's data, but what it says of lora."""
    return [str(ROOT / "configs/quickstart.yaml"), *overrides(base, output, *more)]


def started(base: Path, adapter: Path, output: Path, *more: str) -> list[str]:  # noqa: F811
    return arguments(base, output, f"lora={{start_from: {adapter}}}", *more)


def test_a_run_takes_the_network_of_the_adapter_it_starts_from(base: Path, adapters: Path, tmp_path: Path) -> None:  # noqa: F811
    words = started(base, adapters / "resampler", tmp_path / "run", "train.save_every=2", "connector.depth=1")
    config = load_config(words[0], words[1:])
    assert config.model.connector == "resampler"
    options = config.connector
    assert (options.latents, options.depth, options.start, options.seed) == (3, 1, "pretrained", 9)
    assert (config.image.size, config.image.tiles, config.image.aspect) == (None, 4, "pad")
    train.main([*words, "--dry-run"])
    train.main(words)
    before, after = (
        json.loads((directory / "adapter_config.json").read_text())["network"]
        for directory in (adapters / "resampler", tmp_path / "run/adapter")
    )
    assert before == after
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    train.main([str(tmp_path / "run/config.yaml")])  # which says all of it


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "resampler",
            "model.connector=mlp",
            r"model\.connector: got mlp, and the adapter in \S+, .* with resampler: leave it out",
        ),
        (
            "resampler",
            "connector.latents=4",
            r"connector\.latents: got 4, and the adapter in \S+, .* was trained with 3",
        ),
        ("resampler", "connector.seed=1", r"connector\.seed: got 1, .* was trained with 9"),
        ("resampler", "image.tiles=1", r"image\.tiles: got 1, .* was trained with 4"),
        ("resampler", "image.aspect=squash", r"image\.aspect: got squash, .* was trained with pad"),
        ("large", "image.size=112", r"image\.size: got 112, .* was trained with 84"),
        ("resampler", "image.size=84", r"another network than this; .*\n  image\.size: 84, in the adapter 56"),
        ("plain", "image.size=84", r"another network than this; .*\n  image\.size: 84, in the adapter 56"),
        (
            "plain",
            "model.connector=dense_dci",
            r"another network .*\n  model\.connector: dense_dci, in the adapter linear",
        ),
        ("dense_dci", "image.tiles=4", r"another network .*\n  image\.tiles: 4, in the adapter 1"),
        (
            "resampler",
            "stages=[{name: a, max_steps: 1}]",
            r"stages: got a; .* the adapter that lora\.start_from names has one",
        ),
    ],
)
@pytest.mark.parametrize("look", [[], ["--dry-run"], ["--overfit", "2"]])
def test_what_contradicts_its_network_is_named_before_weights_are_read(
    base: Path,  # noqa: F811
    adapters: Path,
    tmp_path: Path,
    name: str,
    given: str,
    message: str,
    look: list[str],
) -> None:
    words = started(without_weights(base, tmp_path), adapters / name, tmp_path / "run", given, *look)
    with pytest.raises(ValueError, match=message):
        train.main(words)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_an_override_names_is_what_a_line_contradicts(path: Path, adapters: Path) -> None:
    path.write_text(path.read_text() + "image: {tiles: 1}\n")
    override = f"lora.start_from={adapters}/resampler"
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(f"override {override!r}: image.tiles: got 1, and the adapter in ")


def without_weights(base: Path, directory: Path) -> Path:  # noqa: F811
    """The same base, but that its weights cannot be opened, for they are not there."""
    shutil.copytree(base, directory / "base")
    (directory / "base/model.safetensors").unlink()
    return directory / "base"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["connector.start_from={adapters}/dense_dci"],
            r"dense_dci, which connector\.start_from names, has the connector dense_dci, and model\.connector is mlp",
        ),
        (
            ["connector.start_from={adapters}/plain"],
            r"plain, which connector\.start_from names, does not train the connector mlp",
        ),
        (["connector.start_from={adapters}/nowhere"], r"nowhere holds no adapter_config\.json"),
        (
            ["image.size=85"],
            r"image do not fit .*base: an image of 85 pixels is no whole .* take a multiple of 14, such as 84",
        ),
        (
            ["image.size=2800", "image.tiles=4"],
            r"200,000 tokens \(2800 pixels, tiles 4, connector mlp\), and the decoder has [\d,]+ positions: take",
        ),
        (
            ["model.connector=pixel_shuffle", "connector.factor=3"],
            r"model\.connector, connector and image do not fit .*: pixel_shuffle with factor 3 .* divisible by 3; t",
        ),
        (["model.connector=resampler", "connector.latents=9000"], r"9,000 tokens"),
    ],
)
@pytest.mark.parametrize("look", [[], ["--dry-run"], ["--check"], ["--inspect"], ["--overfit", "2"]])
def test_what_does_not_fit_the_checkpoint_is_named_before_weights_are_read(
    base: Path,  # noqa: F811
    adapters: Path,
    tmp_path: Path,
    given: list[str],
    message: str,
    look: list[str],
) -> None:
    if "start_from" in given[0] and look in (["--check"], ["--inspect"]):
        pytest.skip("looks at the data, and starts from nothing")
    changes = ["lora={rank: 2, targets: [language.*]}", "model.connector=mlp"]
    changes += [change.replace("{adapters}", str(adapters)) for change in given]
    with pytest.raises(ValueError, match=message):
        train.main(arguments(without_weights(base, tmp_path), tmp_path / "run", *changes, *look))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_another_connector_is_named_before_weights_are_read(
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Its own one may be named, and is trained on from its values."""
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    convert(model, changed(model.config, ConnectorConfig("resampler", latents=3, depth=1)))
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("model.safetensors", "data"))
    model.save_pretrained(tmp_path / "base")
    same = ["lora={rank: 2, targets: [language.*]}", "model.connector=resampler", "connector={latents: 3, depth: 1}"]
    train.main([*arguments(base, tmp_path / "same", *same), f"model.path={tmp_path}/base", "train.max_steps=1"])
    (tmp_path / "base/model.safetensors").unlink()
    for connector, named in (("mlp", "mlp"), ("resampler", r"resampler \(64, 3\)")):
        for look in ([], ["--dry-run"]):
            words = arguments(base, tmp_path / "run", same[0], f"model.connector={connector}", *look)
            expected = (
                rf"has the connector resampler \(3, 1\), in whose place {named} cannot be put: name the checkpoint's"
            )
            with pytest.raises(ValueError, match=expected):
                train.main([*words, f"model.path={tmp_path}/base"])


def test_dense_connectors_need_layers_to_group(base: Path, tmp_path: Path) -> None:  # noqa: F811
    there = without_weights(base, tmp_path)
    config = json.loads((there / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"do not fit .*: dense_dci does not fit: .* 2 layers; expected 3 or more, or anot"
    ):
        train.main(arguments(there, tmp_path / "run", "lora={rank: 2}", "model.connector=dense_dci"))


def test_runs_of_is_given_all_of_a_configuration(path: Path) -> None:
    """No key is lost on the way to the run itself."""
    config = load_config(path, STAGES)
    assert {
        name for name in RunConfig.model_fields if getattr(runs_of(config)[-1], name) != getattr(config, name)
    } == set()

"""Pushing to the Hub, against a stand-in for its API: what is sent, what is asked, and what an error says."""

from __future__ import annotations

import builtins
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, errors

import merge_lora
import train
from finetune import LoRAConfig, inject_lora, save_adapter
from finetune import __main__ as console
from finetune.lora.protocol import trained_parameters
from finetune.report import push as command
from finetune.report.model_card import NOTICE, show_card
from finetune.report.push import Options, push
from finetune.system.atomic import MANIFEST, write_whole
from model import PaliGemma
from tests.test_scripts import ROOT, base_with_scenes, overrides

httpx: Any = importlib.import_module(errors.HTTPError.__module__.split(".")[0])  # httpx, or what followed it
BASE = ROOT / "assets/tiny-base"
ON_HUB = "google/paligemma-3b-pt-224"


class Hub:
    """A stand-in for HfApi: notes what it is asked. `visibility`: private, by repository that exists."""

    def __init__(self) -> None:
        self.visibility: dict[str, bool] = {}
        self.made: list[tuple[str, bool]] = []
        self.commits: list[dict[str, bytes]] = []
        self.failing: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        return self

    def attempted(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]

    def whoami(self) -> dict[str, str]:
        self.attempted("whoami")
        return {"name": "me"}

    def model_info(self, repo: str) -> SimpleNamespace:
        self.attempted("model_info")
        if repo not in self.visibility:
            raise errors.RepositoryNotFoundError("404", response=response(404))
        return SimpleNamespace(private=self.visibility[repo])

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.attempted("create_repo")
        assert exist_ok
        self.made.append((repo, private))

    def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> SimpleNamespace:
        self.attempted("create_commit")
        assert commit_message
        self.commits.append({})
        for operation in operations:
            with operation.as_file() as file:
                self.commits[-1][operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/abc")


def response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co/api"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    standing_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", standing_in)
    return standing_in


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """In a run's directory, with its card."""
    model = PaliGemma.from_pretrained(BASE)
    inject_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, tmp_path / "run/adapter", ON_HUB, "bfloat16")
    show_card(tmp_path / "run/adapter")
    return tmp_path / "run/adapter"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_whole(tmp_path / "run/merged", lambda path: PaliGemma.from_pretrained(BASE).save_pretrained(path))
    return tmp_path / "run/merged"


def answering(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """What is asked; each is answered with `text`."""
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return text

    monkeypatch.setattr(builtins, "input", answer)
    return asked


def test_an_adapter_goes_up_in_one_commit_with_a_card_that_names_the_repository(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "notes.txt").write_text("mine")
    asked = answering(monkeypatch, "y")
    console.dispatch(["push", str(adapter.parent), "--repo", "me/mine"])
    assert asked == ["push? [y/N] "]
    assert hub.made == [("me/mine", True)]
    (sent,) = hub.commits
    assert sent.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md", "NOTICE"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert sent[name] == (adapter / name).read_bytes()
    card = ModelCard(sent["README.md"].decode())
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card.text
    assert card.data["base_model"] == ON_HUB
    assert sent["NOTICE"].decode() == NOTICE + "\n"
    said = capsys.readouterr().out
    assert "me/mine (new, private)" in said
    assert f"stays here: {MANIFEST}, notes.txt" in said
    assert f"{len(sent['adapter_model.safetensors']):,}" in said
    assert "pushed: https://huggingface.co/me/mine/commit/abc" in said


@pytest.mark.parametrize("answer", ["", "n", "no", "maybe"])
def test_without_a_yes_nothing_is_pushed(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, answer)
    push(Options(adapter, "me/mine"))
    assert (hub.made, hub.commits) == ([], [])
    assert "nothing was pushed" in capsys.readouterr().out


def test_where_nobody_can_be_asked_yes_has_to_be_given(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr(builtins, "input", ended)
    with pytest.raises(ValueError, match="nobody is there to confirm what is pushed: add --yes"):
        push(Options(adapter, "me/mine"))
    assert hub.commits == []
    push(Options(adapter, "me/mine", public=True, yes=True))
    assert hub.made == [("me/mine", False)]


def test_a_checkpoint_goes_up_with_its_tokenizer(hub: Hub, checkpoint: Path) -> None:
    push(Options(checkpoint, "me/mine", yes=True))
    (sent,) = hub.commits
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sent.keys()
    assert MANIFEST not in sent
    assert "NOTICE" not in sent  # the tiny base is none of Google's


def test_nothing_becomes_public_by_accident(hub: Hub, adapter: Path) -> None:
    hub.visibility = {"me/public": False, "me/private": True}
    with pytest.raises(ValueError, match="me/public exists and is public: give --public if that is meant"):
        push(Options(adapter, "me/public", yes=True))
    with pytest.raises(ValueError, match="me/private exists and is private: leave out --public"):
        push(Options(adapter, "me/private", public=True, yes=True))
    assert hub.commits == []
    push(Options(adapter, "me/private", yes=True))
    push(Options(adapter, "me/public", public=True, yes=True))
    assert hub.made == [("me/private", True), ("me/public", False)]


def test_an_edited_card_goes_up_as_it_is(hub: Hub, adapter: Path) -> None:
    (adapter / "README.md").write_text("mine\n")
    push(Options(adapter, "me/mine", yes=True))
    assert hub.commits[0]["README.md"] == b"mine\n"


@pytest.mark.parametrize("path", ["/somewhere/of/mine/base", "../somewhere", "runs/somewhere/base", "assets/tiny-base"])
def test_a_base_that_is_a_path_of_this_machine_is_not_told(hub: Hub, adapter: Path, path: str) -> None:
    """The last one exists, and would be a name on the Hub."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": path}
    (adapter / MANIFEST).unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"names its base by a path of this machine, {path}: give"):
        push(Options(adapter, "me/mine", yes=True))
    push(Options(adapter, "me/mine", base=ON_HUB, yes=True))
    (sent,) = hub.commits
    assert json.loads(sent["adapter_config.json"]) == config | {"base_model_name_or_path": ON_HUB, "revision": None}
    assert ModelCard(sent["README.md"].decode()).data["base_model"] == ON_HUB
    assert not any(path.encode() in content for content in sent.values())


def test_what_is_damaged_or_no_result_is_not_pushed(hub: Hub, adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--base is of adapters"):
        push(Options(checkpoint, "me/mine", base=ON_HUB, yes=True))
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: expected a run, an adapter or a checkpoint"):
        push(Options(tmp_path, "me/mine", yes=True))
    (adapter / "adapter_config.json").write_text(json.dumps(json.loads((adapter / "adapter_config.json").read_text())))
    with pytest.raises(ValueError, match=r"is not as it was written: adapter_config\.json has"):
        push(Options(adapter, "me/mine", yes=True))
    assert hub.commits == []


@pytest.mark.parametrize("name", ["mine", "me/mine/x", "", "../mine", "https://huggingface.co/me/mine", "me/mine x"])
def test_a_name_that_is_none_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name on the Hub; expected OWNER/NAME"):
        Options(Path("x"), name)


def of_status(status: int) -> Callable[[], Exception]:
    return lambda: errors.HfHubHTTPError("said at length", response=response(status), server_message="no\nand more")


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("whoami", lambda: errors.LocalTokenNotFoundError("no"), "no token is stored here: run `hf auth login`"),
        ("whoami", lambda: errors.OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE is set, so that nothing goes"),
        ("whoami", of_status(401), "the stored token is not valid: run `hf auth login`"),
        ("whoami", lambda: httpx.ConnectError("no route"), r"the Hub cannot be reached \(ConnectError\)"),
        ("model_info", lambda: httpx.ReadTimeout("late"), r"the Hub cannot be reached \(ReadTimeout\)"),
        ("create_repo", of_status(403), "the stored token may not write to me: run `hf auth login`"),
        ("create_commit", of_status(429), "the Hub takes no more requests at the moment"),
        ("create_commit", of_status(500), r"the Hub refuses \(500\): no$"),
        ("create_commit", lambda: ConnectionResetError("gone"), r"cannot be reached \(ConnectionResetError\)"),
    ],
)
def test_an_error_says_in_a_sentence_what_to_do(
    hub: Hub, adapter: Path, where: str, error: Callable[[], Exception], said: str
) -> None:
    hub.failing[where] = error()
    with pytest.raises(ValueError, match=said) as raised:
        push(Options(adapter, "me/mine", yes=True))
    assert "\n" not in str(raised.value)
    assert hub.commits == []


def test_without_a_network_the_real_library_says_what_to_do(adapter: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(ValueError, match=r"no token is stored here|HF_HUB_OFFLINE is set"):
        push(Options(adapter, "me/mine", yes=True))


def test_merging_pushes_what_it_wrote_once_it_is_verified(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    argv = [str(adapter), "--base", str(BASE), "--output", str(tmp_path / "merged"), "--dtype", "float32"]
    with pytest.raises(ValueError, match="--public and --yes are of --push"):
        merge_lora.main([*argv, "--yes"])
    with pytest.raises(ValueError, match="is no name on the Hub"):
        merge_lora.main([*argv, "--push", "mine"])
    assert not (tmp_path / "merged").exists()
    merge_lora.main([*argv, "--push", "me/mine", "--yes"])
    assert hub.made == [("me/mine", True)]
    assert hub.commits[0]["model.safetensors"] == (tmp_path / "merged/model.safetensors").read_bytes()


def test_merging_does_not_begin_where_the_push_could_not_follow(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.failing["whoami"] = errors.LocalTokenNotFoundError("no")
    with pytest.raises(ValueError, match="no token is stored here"):
        merge_lora.main(
            [str(adapter), "--base", str(BASE), "--output", str(tmp_path / "merged"), "--push", "me/mine", "--yes"]
        )
    assert not (tmp_path / "merged").exists()


def test_training_pushes_its_result(hub: Hub, tmp_path: Path) -> None:
    base = base_with_scenes(tmp_path / "base")
    argv = ["configs/quickstart.yaml", *overrides(base, tmp_path / "run", "lora=null"), "--push", "me/mine"]
    with pytest.raises(ValueError, match=r"train from the base's name on the Hub, or push it afterwards, .* --base"):
        train.main([*argv, "--yes", "lora={}"])
    with pytest.raises(ValueError, match="--push is of what is trained: leave it out"):
        train.main([*argv, "--yes", "--dry-run"])
    with pytest.raises(ValueError, match="nobody is there to confirm what is pushed: add --yes"):
        train.main(argv)
    assert not (tmp_path / "run" / "model").exists()
    train.main([*argv, "--yes"])
    assert hub.made == [("me/mine", True)]
    assert hub.commits[0]["model.safetensors"] == (tmp_path / "run/model/model.safetensors").read_bytes()


def test_help_names_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.build_parser().parse_args(["--help"])
    assert "--repo OWNER/NAME" in capsys.readouterr().out

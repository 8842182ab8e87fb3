"""`paligemma-lora push RUN|DIR --repo OWNER/NAME`: an adapter or a checkpoint onto the Hugging Face Hub.

What goes where is shown and has to be confirmed. All files go in one commit, so that the repository has all of them or
none; one that is made for it is private unless --public says otherwise. The card names the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import cli
from finetune.system.paths import path_argument

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from finetune.report.subject import Subject

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NOBODY = "nobody is there to confirm what is pushed: add --yes"
TOKENS = "https://huggingface.co/settings/tokens"


def main(argv: Sequence[str]) -> None:
    push(options_of(build_parser().parse_args(argv)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{cli.CONSOLE} push", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", metavar="RUN|DIR", type=path_argument, help="a run, an adapter, or a checkpoint")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="where to: made if it does not exist")
    parser.add_argument(
        "--base", metavar="OWNER/NAME", help="base of an adapter on the Hub, where it names a directory"
    )
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    parser.add_argument("--yes", action="store_true", help="without asking")
    return parser


@dataclasses.dataclass(frozen=True)
class Options:
    """What to push, and where to."""

    directory: Path
    repo: str
    base: str | None = None
    public: bool = False
    yes: bool = False

    def __post_init__(self) -> None:
        for option, name in (("--repo", self.repo), ("--base", self.base)):
            if name is not None and not REPO.fullmatch(name):
                raise ValueError(f"{option} {name!r} is no name on the Hub; expected OWNER/NAME, such as me/my-adapter")


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(arguments.directory, arguments.repo, arguments.base, arguments.public, arguments.yes)


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """The options of a script that pushes what it has made. what: that, in words."""
    parser.add_argument("--push", metavar="OWNER/NAME", help=f"push {what} to the Hub, once confirmed")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument("--yes", action="store_true", help="with --push: without asking")


def requested(arguments: argparse.Namespace, directory: Path) -> Options | None:
    """What these options ask for, with access to the repository, before the work that takes long; or None.

    Raises:
        ValueError: there is no access; nobody could confirm; an option stands without --push.
    """
    if not arguments.push:
        if arguments.public or arguments.yes:
            raise ValueError("--public and --yes are of --push: give it, or leave them out")
        return None
    options = Options(directory, arguments.push, public=arguments.public, yes=arguments.yes)
    if not options.yes and not sys.stdin.isatty():
        raise ValueError(NOBODY)
    require_access(options)
    return options


@dataclasses.dataclass(frozen=True)
class Destination:
    """A repository as it will be."""

    repo: str
    exists: bool
    private: bool

    def __str__(self) -> str:
        return f"{self.repo} ({'exists' if self.exists else 'new'}, {'private' if self.private else 'public'})"


def push(options: Options) -> None:
    """Show what goes where, ask, and send it.

    Raises:
        ValueError: it is damaged, nothing that can be pushed, or the Hub does not take it; says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from finetune.report.model_card import title
    from finetune.system.console import show

    directory = pushed_directory(options.directory)
    subject, files = files_to_push(directory, options)
    api = HfApi()
    place = destination(api, options.repo, options.public)
    show_files(directory, files, place)
    if not (options.yes or confirmed()):
        show("nothing was pushed")
        return
    adding = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    with explained(options.repo):
        api.create_repo(options.repo, private=place.private, exist_ok=True)
        done = api.create_commit(options.repo, adding, commit_message=title(subject))
    show(f"pushed: {done.commit_url}")


def pushed_directory(given: Path) -> Path:
    """What of a run is pushed: its adapter, or the checkpoint where all was trained."""
    from finetune.adapters.locate import find_adapter

    if (given / "config.yaml").is_file() and (given / "model").is_dir() and not (given / "adapter").is_dir():
        return given / "model"
    return find_adapter(given)


def files_to_push(directory: Path, options: Options) -> tuple[Subject, dict[str, Path | bytes]]:
    """What is in the directory, and its files by their name in the repository: as they are on the disk, or the bytes
    that stand there instead. The card is made for the repository, unless a person has edited it.

    Raises:
        ValueError: the directory is damaged, or nothing that can be pushed; or the adapter names its base by a path.
    """
    from finetune.adapters.card_file import CARD_FILE, is_edited, signed
    from finetune.adapters.metadata import CONFIG_FILE
    from finetune.report.model_card import NOTICE, card
    from finetune.report.subject import subject_of
    from finetune.system.atomic import require_whole
    from model.hub import CHECKPOINT_FILES

    subject = dataclasses.replace(subject_of(directory, repo=options.repo), named_base=options.base)
    if options.base and not subject.is_adapter:
        raise ValueError(f"--base is of adapters: {directory} is a checkpoint, which needs no other")
    require_whole(directory)
    found = {path.name for pattern in (CONFIG_FILE, *CHECKPOINT_FILES) for path in directory.glob(pattern)}
    files: dict[str, Path | bytes] = {name: directory / name for name in sorted(found)}
    if subject.weights_file not in files and "model.safetensors.index.json" not in files:
        raise ValueError(f"{directory} holds no {subject.weights_file}: expected a run, an adapter or a checkpoint")
    if subject.is_adapter:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        require_nameable_base(subject, config.get("base_model_name_or_path"))
        if options.base:
            config |= {"base_model_name_or_path": options.base, "revision": None}
            files[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    edited = is_edited(directory)
    files[CARD_FILE] = directory / CARD_FILE if edited else signed(card(subject)).encode()
    if subject.has_gemma_weights:
        files["NOTICE"] = f"{NOTICE}\n".encode()  # which these terms, section 3.1, ask for
    return subject, files


def require_nameable_base(subject: Subject, stored: str | None) -> None:
    """ValueError where an adapter names its base by a path: of no use to whoever opens it, and where it is relative
    perhaps the name of another checkpoint on the Hub.
    """
    if subject.named_base is None and stored and subject.hub_base is None:
        raise ValueError(
            f"{subject.directory} names its base by a path of this machine, {stored}: give the base's name on the Hub, "
            "such as --base google/paligemma-3b-pt-224"
        )


def destination(api: HfApi, repo: str, public: bool) -> Destination:
    """The repository, which is looked up.

    Raises:
        ValueError: there is no access to it; or it is public, and that was not asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with explained(repo):
        api.whoami()
        try:
            private = bool(api.model_info(repo).private)
        except RepositoryNotFoundError:
            return Destination(repo, exists=False, private=not public)
    if not private and not public:
        raise ValueError(f"{repo} exists and is public: give --public if that is meant, or another --repo")
    if private and public:
        raise ValueError(
            f"{repo} exists and is private: leave out --public, and make it public in its settings, "
            f"https://huggingface.co/{repo}/settings"
        )
    return Destination(repo, exists=True, private=private)


def require_access(options: Options) -> None:
    """ValueError where a push could not follow on work that takes long."""
    from huggingface_hub import HfApi

    destination(HfApi(), options.repo, options.public)


def show_files(directory: Path, files: dict[str, Path | bytes], place: Destination) -> None:
    from finetune.system.console import new_table, show

    table = new_table("file", "size")
    sizes = {name: len(found) if isinstance(found, bytes) else found.stat().st_size for name, found in files.items()}
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    left = sorted({path.name for path in directory.iterdir()} - files.keys())
    show(f"{directory} -> {place}", table, f"{len(files)} files, {sum(sizes.values()):,} bytes")
    if left:
        show(f"stays here: {', '.join(left)}")


def confirmed() -> bool:
    """Whether a person says yes.

    Raises:
        ValueError: nobody is there to be asked.
    """
    try:
        return input("push? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError as error:
        raise ValueError(NOBODY) from error


@contextlib.contextmanager
def explained(repo: str) -> Iterator[None]:
    """Within this, errors of the Hub and the network become a ValueError that says what to do."""
    from huggingface_hub import errors

    owner, page = repo.split("/")[0], f"https://huggingface.co/{repo}"
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"no token is stored here: run `hf auth login` with one that may write ({TOKENS})") from error
    except errors.OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set, so that nothing goes to the Hub: unset it") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: f"the stored token is not valid: run `hf auth login` with one that may write ({TOKENS})",
            403: f"the stored token may not write to {owner}: run `hf auth login` with one that may ({TOKENS})",
            404: "it is not there, or the stored token may not see it",
            429: "the Hub takes no more requests at the moment: wait, and start the same command again",
        }
        said = str(error.server_message or error).splitlines()[0]
        raise ValueError(f"{page}: {reasons.get(status, f'the Hub refuses ({status}): {said}')}") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # of whichever library the Hub's uses
        raise ValueError(
            f"{page}: the Hub cannot be reached ({type(error).__name__}); start the same command again with a network"
        ) from error


if __name__ == "__main__":
    cli.run(main)

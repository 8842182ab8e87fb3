"""Files and folders that a source is made of: there, and of the right kind, or an error that names them."""

import argparse
import os
from os import PathLike
from pathlib import Path
from string import Template

File = str | PathLike[str]


def require_file(path: Path) -> os.stat_result:
    """What the system knows of a file. ValueError where there is none, or nothing in it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file")
    if not path.exists():
        raise ValueError(f"{path} does not exist; correct its path")
    status = path.stat()
    if not status.st_size:
        raise ValueError(f"{path} is empty; expected examples in it")
    return status


def require_folder(path: File, what: str = "the folder of the images") -> Path:
    """A folder, absolute. ValueError where there is none; what: for the message."""
    folder = Path(path).absolute()
    if not folder.is_dir():
        said = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{path} {said}; expected {what}")
    return folder


def path_argument(text: str) -> Path:
    """A path in which `~`, `$NAME` and `${NAME}` are expanded; `$$` is a dollar sign."""
    try:
        return Path(Template(text).substitute(os.environ)).expanduser()
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the environment variable {error} is not set") from error
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; write $$ for a dollar sign, ./~ for a tilde") from error

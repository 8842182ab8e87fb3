"""The Hugging Face Hub: which files of a checkpoint are downloaded, and what to do where they cannot be."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path

SIDE_FILES = ["tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"]
SIDE_FILES += ["*processor_config.json", "generation_config.json", "chat_template.json", "chat_template.jinja"]
CHECKPOINT_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES]


def fetch(path_or_hub_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a checkpoint; a Hub id (`owner/name`) is downloaded to the Hub's cache first, without
    `weights` its small files alone: config.json, tokenizer and processor.

    Raises:
        ValueError: no such directory, or the Hub does not give it out; says what to do.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            warnings.warn(f"{path} is a directory: revision {revision!r}, of a Hub id, has no effect", stacklevel=2)
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or path.parts[0] in (".", ".."):
        raise ValueError(
            f"{path_or_hub_id} is neither a directory nor a Hub id (owner/name): correct the path, or give the Hub id"
        )
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{path_or_hub_id}"
    wanted = CHECKPOINT_FILES if weights else ["config.json", *SIDE_FILES]
    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        reason = f"its licence must be accepted first: log in at {page}, accept it, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}: see the branches at {page}/tree/main"
    except errors.RepositoryNotFoundError:
        reason = (
            f"neither a directory here nor a model on the Hub, unless a private one: correct the name ({page}), or run "
            "`hf auth login`"
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise ValueError(f"{path_or_hub_id} cannot be written to the Hub's cache ({error}); see HF_HOME") from error
        reason = (
            f"there is no directory {path.absolute()}, and as a Hub id it is neither in the cache nor to be had from "
            f"there ({type(error).__name__}). Correct the path; or, for a model on the Hub, accept the licence at "
            f"{page}, run `hf auth login` and start again with a network"
        )
    raise ValueError(f"{path_or_hub_id}: {reason}")

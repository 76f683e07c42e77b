"""From what the user wrote (`./folder` or `org/name@revision`) to a folder that holds the files a merge needs.

Only configs, tokenizer and weights are downloaded, never code; a download that broke off resumes from the cache.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from btx_merge.errors import InputError, Problem

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "README.md", "*.txt"]
"""Configs, tokenizer, chat template, model card: all of a repository that is not weights or code."""
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Located:
    """A source's files on this machine."""

    folder: Path
    repo_id: str | None = None
    """The Hub id; None for a folder of the user's."""
    revision: str | None = None
    """The commit that a Hub id was resolved to."""

    @property
    def public_name(self) -> str:
        """What may be published about it: the Hub id, or the folder's own name without its path."""
        return self.repo_id or self.folder.resolve().name


def locate(source: str, reference: str) -> Located:
    """The folder for a reference, downloaded where it is a Hub id.

    Raises:
        InputError: neither a folder nor a Hub id; or the Hub refuses, lacks it or cannot be reached.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Located(folder)
    repo_id, _, revision = reference.partition("@")
    if folder.exists() or reference.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(repo_id):
        found = "a file" if folder.exists() else "no such folder"
        expected = "a folder with config.json and weights, or a Hub id `org/name` or `org/name@revision`"
        raise InputError([Problem(source, reference, found, expected, "Check the path.")])
    return _download(source, repo_id, revision or None)


def _download(source: str, repo_id: str, revision: str | None) -> Located:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], at: str | None) -> Path:
        return Path(snapshot_download(repo_id, revision=at, allow_patterns=patterns))

    def refused(found: str, remedy: str) -> InputError:
        where = repo_id + (f"@{revision}" if revision else "")
        return InputError([Problem(source, where, found, "", remedy)])

    try:
        folder = fetch(SMALL_FILES, revision)
        commit = folder.name
        fetch(_weight_patterns(folder), commit)
    except hub.HFValidationError as error:
        found = f"no such folder, and no name that a repository can have ({_first_line(error)})"
        raise refused(found, "A Hub id is `org/name`.") from error
    except hub.GatedRepoError as error:
        remedy = "Ask for access on its page on the Hub, then run `hf auth login`."
        raise refused("the repository is gated and this token has no access", remedy) from error
    except hub.RevisionNotFoundError as error:
        raise refused("the repository has no such revision", "Check what stands after the @.") from error
    except hub.RepositoryNotFoundError as error:
        remedy = "Check the name (a folder is written ./name); for a private one run `hf auth login`."
        raise refused("no such folder here and no such repository on the Hub", remedy) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        remedy = "Go online (unset HF_HUB_OFFLINE), or give a folder."
        raise refused("not a folder, not in the Hub's cache, and the Hub cannot be reached", remedy) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise refused(
            f"the download failed ({_first_line(error)})", "Run the same command again: it resumes."
        ) from error
    return Located(folder, repo_id, commit)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _weight_patterns(folder: Path) -> list[str]:
    """The weights to fetch, known from the small files: safetensors where there are any, otherwise .bin."""
    if (folder / "adapter_config.json").exists():
        return ["adapter_model.safetensors", "adapter_model.bin"]
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        return sorted(str(shard) for shard in shards)
    return ["model.safetensors", "pytorch_model.bin"]

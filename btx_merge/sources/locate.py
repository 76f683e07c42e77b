"""The way from what the user wrote (`./folder` or `org/name@revision`) to a folder with the files that a merge needs.

Only configs, tokenizer and weights are downloaded, never code. After a download that broke off, finished files are
in the cache.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from btx_merge.errors import InputError, Problem
from btx_merge.files.changes import Stamp, stamps_in
from btx_merge.files.folder import is_plain_name, read_json
from btx_merge.reporting import first_line

SMALL_FILES = [
    *("config.json", "generation_config.json", "adapter_config.json", "README.md", "btx_recipe.yaml"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
]
"""What is read of a repository, or kept in what is made of it, beside its weights.

No code, and of folders only the chat templates."""
LOG_IN_AGAIN = "Run `hf auth login`, or set HF_TOKEN to one that is valid."
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"(?:.*[\\/])?models--([\w.-]+)[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]*")


@dataclass(frozen=True)
class Located:
    """A source's files on this machine."""

    folder: Path
    repo_id: str | None = None
    """The Hub id; None for a folder of the user's. A folder of a Hub's cache is known by it too."""
    revision: str | None = None
    """The commit that a Hub id was resolved to."""
    stamps: Mapping[Path, Stamp] = field(init=False, compare=False, repr=False)
    """Of its files, before any of them is read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", stamps_in(self.folder))

    @property
    def public_name(self) -> str:
        """What may be published about it: the Hub id, or the folder's own name without its path."""
        return self.repo_id or self.folder.resolve().name

    @property
    def public_reference(self) -> str:
        """How a published recipe refers to it: by its Hub id and commit, or by its folder's name without a path."""
        return f"{self.repo_id}@{self.revision}" if self.repo_id else self.public_name


def locate(source: str, reference: str, *, weights: bool = True) -> Located:
    """Return the folder for a reference, downloaded where it is a Hub id; without weights, only its small files.

    Raises:
        InputError: neither a folder nor a Hub id; or the Hub refuses, lacks it or cannot be reached.
    """
    if error := _closed(reference):
        expected = "a folder that can be entered"
        remedy = "Get the permission for it and the folders above it, or give a copy."
        raise InputError([Problem(source, reference, error.strerror or str(error), expected, remedy)])
    if is_folder(reference):
        folder = Path(reference).expanduser()
        return Located(folder, *(cached_repository(str(folder.resolve())) or (None, None)))
    is_there = _is_there(reference)
    repo_id, _, revision = reference.partition("@")
    if is_there or reference.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(repo_id):
        found = "a file" if is_there else "no such folder"
        expected = "a folder with config.json and weights, or a Hub id `org/name` or `org/name@revision`"
        raise InputError([Problem(source, reference, found, expected, "Check the path.")])
    return _download(source, repo_id, revision or None, weights)


def is_folder(reference: str) -> bool:
    """Return whether a folder of that name is there; also where no name can be so."""
    return _is_there(reference) and Path(reference).expanduser().is_dir()


def _is_there(reference: str) -> bool:
    try:
        return Path(reference).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # nobody's home, a name too long, a byte that no name has
        return False


def _closed(reference: str) -> PermissionError | None:
    """Return the system's refusal to say whether a path is there, as below a folder that may not be entered."""
    try:
        Path(reference).expanduser().exists()
    except PermissionError as error:
        return error
    except (OSError, RuntimeError, ValueError):
        pass
    return None


def cached_repository(path: str) -> tuple[str, str] | None:
    """Return the Hub id and commit of a folder in a Hub's cache, on this machine or another, by its path alone.

    >>> cached_repository("/home/me/.cache/huggingface/hub/models--org--name/snapshots/" + "0f" * 20)
    ('org/name', '0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f')
    """
    match = _SNAPSHOT.fullmatch(path)
    return (match[1].replace("--", "/"), match[2]) if match else None


def _download(source: str, repo_id: str, revision: str | None, weights: bool) -> Located:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], at: str | None) -> Path:
        return Path(snapshot_download(repo_id, revision=at, allow_patterns=patterns))

    def refused(found: str, remedy: str) -> InputError:
        where = repo_id + (f"@{revision}" if revision else "")
        return InputError([Problem(source, where, found, "a repository that can be read", remedy)])

    def failed(error: Exception) -> InputError:
        if isinstance(error, hub.HfHubHTTPError) and error.response.status_code == 401:
            return refused("the Hub does not know this token", LOG_IN_AGAIN)
        found = f"the download failed ({type(error).__name__}: {first_line(error)})"
        return refused(found, "Run the same command again: finished files are kept.")

    try:
        with bars_on_terminals_only():
            folder = fetch(SMALL_FILES, revision)
            commit = folder.name
            for names in _weight_choices(folder) if weights else ():
                fetch([*SMALL_FILES, *names], commit)  # those are there; no pattern without a match merits a warning
                if any((folder / name).exists() for name in names):
                    break
    except hub.HFValidationError as error:
        found = f"no such folder, and no name that a repository can have ({first_line(error)})"
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
        if isinstance(error.__cause__, hub.HfHubHTTPError):  # it was reached, and said no
            raise failed(error.__cause__) from error
        remedy = "Go online (unset HF_HUB_OFFLINE), or give a folder."
        raise refused("not a folder, not in the Hub's cache, and the Hub cannot be reached", remedy) from error
    except Exception as error:  # HfHubHTTPError, OSError, and those of httpx, which have two names by now
        raise failed(error) from error
    return Located(folder, repo_id, commit)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Hide huggingface_hub's progress bars where stderr is no terminal: it shows them wherever that leads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def _weight_choices(folder: Path) -> Iterator[list[str]]:
    """List names of the weights, preferred ones first: the first choice of which there are any is enough."""
    if (folder / "adapter_config.json").exists():
        yield from (["adapter_model.safetensors"], ["adapter_model.bin"])
        return
    yield ["model.safetensors"]
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            shards = read_json(folder / index)["weight_map"].values()
        except (InputError, KeyError, AttributeError, TypeError):
            continue  # not there, or what is wrong with it is said when the source is opened
        yield sorted({shard for shard in shards if is_plain_name(shard) and not set(shard) & set("[]")})
    yield ["pytorch_model.bin"]

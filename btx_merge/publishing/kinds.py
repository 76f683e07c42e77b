"""The kinds of folders to publish: a merged model, an export or an extract of one, or an adapter for one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from btx_merge.checkpoints.layout import INDEX_FILE
from btx_merge.model.files import BRANCH, EVALUATION, MODEL_CODE, PICTURE, ROUTING
from btx_merge.model.records import RECIPE_FILE
from btx_merge.sources.tokenizer_files import TOKENIZER_FILES

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_TOKENIZER_FILES = (*TOKENIZER_FILES, "additional_chat_templates/*.jinja")
_MODEL_FILES = ("config.json", "generation_config.json", INDEX_FILE, RECIPE_FILE, *_TOKENIZER_FILES)
_OF_A_RUN = (PICTURE, ROUTING, EVALUATION)


@dataclass(frozen=True)
class Kind:
    """What one kind of folder holds, and what its card has to say."""

    name: str
    """The config's `model_type`; or `adapter`."""
    text: str
    files: tuple[str, ...]
    """Beside a model's weights; a pattern may match several."""
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    relations: tuple[str, ...] = ("merge", "finetune")
    """What `base_model_relation` may be: made of other models, or a fitted or finetuned one of them."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is no model by itself."""
        return self is ADAPTER

    def has(self, name: str) -> bool:
        """Return whether a file belongs to it, so that another one's file of that name would change it."""
        is_weights = not self.is_adapter and MODEL_WEIGHTS.fullmatch(name) is not None
        return is_weights or any(fnmatchcase(name, pattern) for pattern in self.files)


BTX = Kind("btx", "a merged model", (*_MODEL_FILES, *_OF_A_RUN, *MODEL_CODE), tags=("btx",))
ADAPTER = Kind(
    "adapter",
    "an adapter of btx train or btx branch",
    (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECIPE_FILE, BRANCH, *_OF_A_RUN, *_TOKENIZER_FILES),
    library="peft",
    relations=("adapter",),
)
_BRANCH = Kind("llama", "a Llama of btx branch", (*_MODEL_FILES, PICTURE, BRANCH), relations=("finetune",))
_KINDS = (
    BTX,
    Kind("mixtral", "a Mixtral of btx export", _MODEL_FILES),
    Kind("llama", "a Llama of btx extract", _MODEL_FILES),
    ADAPTER,
)


def kind_of(name: object, files: Collection[str], card: str) -> Kind | None:
    """Return the kind of a folder or repository; None where it is none of those that btx-merge makes.

    Any Llama has the same config as one that was taken out of a merged model. That one carries the merge's recipe, or
    at least a card that names btx-merge.

    Args:
        name: the config's `model_type`; `adapter` where it is an adapter's.
        files: the names of its files.
        card: README.md.
    """
    if name == _BRANCH.name and BRANCH in files:
        return _BRANCH
    kind = next((kind for kind in _KINDS if kind.name == name), None)
    is_ours = kind is BTX or RECIPE_FILE in files or "btx-merge" in card
    return kind if is_ours else None

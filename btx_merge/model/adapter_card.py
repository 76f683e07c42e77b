"""The model card of an adapter that was trained on a merged model, in place of the template that peft writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_merge.model.card import CITATION, path_line, project_link, take_over_terms, with_metadata
from btx_merge.model.files import BRANCH
from btx_merge.model.records import RECIPE_FILE
from btx_merge.sources.cards import code_in_card, front_matter, hub_link, in_card
from btx_merge.sources.locate import Located

_BASE_COMMENT = "  # the folder of the base model, or its id on the Hub"
_REVISION_COMMENT = "  # of the base model"
_BASE_LINE = re.compile(rf'^base = ".*"{re.escape(_BASE_COMMENT)}$', re.MULTILINE)
_REVISION_LINE = re.compile(rf"^revision = .*{re.escape(_REVISION_COMMENT)}$", re.MULTILINE)
_BASE_SENTENCE = re.compile(r"^- Base model: .*$", re.MULTILINE)


@dataclass(frozen=True)
class AdapterKind:
    """What a card says of an adapter by the kind of its base."""

    base: str
    tags: tuple[str, ...]
    trained: Mapping[str, str]
    """Value of `lora_target` to the part of the base that was adapted."""
    record: str
    """The file with the settings of the run."""
    loading: str
    """Arguments of `from_pretrained` for the base."""
    needed: str
    """What has to be installed."""


OF_A_MERGED_MODEL = AdapterKind(
    base="a Branch-Train-MiX model",
    tags=("lora", "btx", "branch-train-mix", "mixture-of-experts"),
    trained={
        "routers": "its routers, of which each has at least the rank of the number of experts",
        "shared": "its attention, and its routers, of which each has at least the rank of the number of experts",
        "experts": "its experts",
    },
    record=RECIPE_FILE,
    loading=", trust_remote_code=True",
    needed="transformers 5 and peft are needed. "
    "With btx-merge installed, `import btx_merge` replaces `trust_remote_code=True`.",
)
OF_A_SEED = AdapterKind(
    base="the seed of a Branch-Train-MiX model",
    tags=("lora", "branch-train-mix"),
    trained={"ff": "its feed-forward blocks", "all": "its attention and its feed-forward blocks"},
    record=BRANCH,
    loading="",
    needed="transformers and peft are needed.",
)


def write_adapter_card(
    folder: Path, located: Located, entry: Mapping[str, Any], kind: AdapterKind = OF_A_MERGED_MODEL
) -> None:
    """Write README.md of an adapter into its folder.

    Args:
        located: the model that it was trained on.
        entry: the record of the run.
        kind: what that model is.
    """
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    metadata["tags"] = list(kind.tags)
    if located.repo_id:
        metadata |= _origin(located.repo_id)
    take_over_terms(metadata, located)
    name = located.public_name
    base = f"- Base model: {code_in_card(name)}, a local folder."
    if located.repo_id:
        base = _base_sentence(located.repo_id, located.revision)
    body = f"""
# A LoRA for {in_card(name.rpartition("/")[2])}

Trained by {project_link()} on {kind.base}, which it needs and does not change.

{base}
- Adapted, with rank {entry["lora_r"]}: {kind.trained[entry["lora_target"]]}.
- The run, with all settings: `{kind.record}`.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{path_line(".")}
{_base_line(json.dumps(name))}
{_revision_line(located.revision)}
tokenizer = AutoTokenizer.from_pretrained(base, revision=revision{kind.loading})
model = AutoModelForCausalLM.from_pretrained(base, revision=revision{kind.loading}, dtype="auto")
model = PeftModel.from_pretrained(model, path)
inputs = tokenizer("The answer is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

{kind.needed}

{CITATION}"""
    (folder / "README.md").write_text(with_metadata(metadata, body), encoding="utf-8")


def with_base(card: str, base: str, revision: str | None) -> str:
    """Return an adapter's card with the base model's id on the Hub in its metadata, its text and its code."""
    metadata, body = front_matter(card)
    body = _BASE_LINE.sub(lambda match: _base_line(json.dumps(base)), body)
    body = _REVISION_LINE.sub(lambda match: _revision_line(revision), body)
    body = _BASE_SENTENCE.sub(lambda match: _base_sentence(base, revision), body, count=1)
    return with_metadata({**metadata, **_origin(base)}, body) if metadata else card


def _origin(base: str) -> dict[str, Any]:
    return {"base_model": [base], "base_model_relation": "adapter"}


def _base_sentence(base: str, revision: str | None) -> str:
    return f"- Base model: {hub_link(base, revision)}."


def _base_line(base: str) -> str:
    return f"base = {base}{_BASE_COMMENT}"


def _revision_line(revision: str | None) -> str:
    value = f'"{revision}"' if revision else "None"
    return f"revision = {value}{_REVISION_COMMENT}"

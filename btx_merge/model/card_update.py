"""The model card of a model that was changed: fitted, finetuned or edited."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.files.folder import read_text
from btx_merge.model.card import (
    CITATION,
    CITATION_TITLE,
    ROUTERS_TITLE,
    UNTRAINED_SENTENCE,
    how_to_use,
    project_link,
    with_metadata,
    with_path,
)
from btx_merge.model.held_out import MODEL_INDEX, OF_AN_EARLIER_ONE, OF_THIS_MODEL, model_index
from btx_merge.sources.cards import front_matter
from btx_merge.sources.locate import Located

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


_ROUTERS_LINE = re.compile(r"^- Routers: .*$", re.MULTILINE)
_NO_TITLE = "A Branch-Train-MiX model"


def update_card(
    folder: Path,
    section: str,
    sentence: str = "",
    *,
    located: Located | None = None,
    results: Sequence[EvalResult] | None = (),
) -> None:
    """Add what was done with a model to the card in its folder; the arguments are those of `updated_card`."""
    card = folder / "README.md"
    text = read_text(card) if card.exists() else ""
    card.write_text(updated_card(text, section, sentence, located, results), encoding="utf-8")


def updated_card(
    text: str,
    section: str,
    sentence: str,
    located: Located | None,
    results: Sequence[EvalResult] | None,
) -> str:
    """Return the card with a section about what was done, and without what is no longer true.

    Args:
        text: the card as it was; empty where there was none.
        section: goes before the citation, or to the end. One about routers takes the place of an earlier one.
        sentence: where the routers were trained, for the place where the card says how they came about.
        located: the model that was changed. One from the Hub becomes the base model.
        results: held-out figures of the model as it is now. None: the old ones still hold.
    """
    metadata, body = front_matter(text or bare_card())
    body = with_path(body, ".")  # one from the Hub names its repository, which holds another model
    if results is not None:
        body = body.replace(OF_THIS_MODEL, OF_AN_EARLIER_ONE)
    if sentence and UNTRAINED_SENTENCE.search(body):
        body = UNTRAINED_SENTENCE.sub(lambda match: sentence, body)
    elif sentence:
        body = _ROUTERS_LINE.sub(lambda match: match[0].replace(sentence, "") + sentence, body, count=1)
    if section.startswith(ROUTERS_TITLE):
        body = without_section(body, ROUTERS_TITLE)
    body = with_section(body, section)
    if not metadata:  # there is none, or none that can be read: what its author wrote is left alone
        return body
    return with_metadata(_updated_metadata(metadata, body, located, results), body)


def title_of(body: str) -> str:
    """Return what the first heading of a card says."""
    match = re.search(r"^# +(.+?)\s*$", body, re.MULTILINE)
    return match[1] if match else _NO_TITLE


def _updated_metadata(
    metadata: Mapping[str, Any], body: str, located: Located | None, results: Sequence[EvalResult] | None
) -> dict[str, Any]:
    out = dict(metadata)
    if located and located.repo_id:
        out |= {"base_model": [located.repo_id], "base_model_relation": "finetune"}
    if results is not None:
        out.pop(MODEL_INDEX, None)
    if results:
        out[MODEL_INDEX] = model_index(title_of(body), results)
    return out


def with_section(body: str, section: str) -> str:
    """Put a section before the citation, or at the end."""
    before, citation, after = body.partition(f"\n{CITATION_TITLE}\n")
    return before.rstrip() + "\n\n" + section.rstrip() + "\n" + (citation and f"{citation}{after}")


def without_section(body: str, title: str) -> str:
    """Take out a section with all up to the next heading of its level, or of a higher one."""
    return re.sub(rf"^{re.escape(title)}\n.*?(?=^#{{1,2}} |\Z)", "", body, flags=re.MULTILINE | re.DOTALL)


def bare_card() -> str:
    """Return the beginning of a card for a model that has none."""
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["btx", "branch-train-mix", "mixture-of-experts", "merge"],
    }
    made = f"A Mixture of Experts, made with {project_link()}."
    body = f"\n# {_NO_TITLE}\n\n{made}\n\n{how_to_use(', trust_remote_code=True')}\n{CITATION}"
    return with_metadata(metadata, body)

"""A recipe as a commented YAML file, to be filled in: every option with its description and its value."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from btx_merge.merging.fits import fit_of_text
from btx_merge.merging.recipe import MergeRecipe
from btx_merge.model.records import anchor_sources
from btx_merge.sources.source import ExpertSpec
from btx_merge.texts.references import domain_texts_of, plain_values
from btx_merge.values import field_descriptions

_WIDTH = 100  # of a comment in the file
_HEAD = "A recipe for `btx merge --recipe FILE`: every option, with its value. Flags of the command win over it."


def recipe_template(values: Mapping[str, Any]) -> str:
    """Return a recipe file with these values, and the default of every other option.

    Folders among the values are made absolute, for a recipe file's folders are relative to the file.

    Args:
        values: those of `MergeRecipe`; neither a seed nor an expert is needed.
    """
    values = _absolute({**fit_of_text(values), **values})
    descriptions = field_descriptions(MergeRecipe)
    blocks = [_comment(_HEAD)]
    for item in fields(MergeRecipe):
        if item.name == "resolved":  # for a merge to write
            continue
        lines = [_comment(descriptions[item.name])]
        if item.name == "experts":
            lines += [_comment("An expert with options:"), _comment_of_spec()]
        elif item.name == "domain_text":
            lines += [_comment("With a weight, or several texts: `code: {text: [a.jsonl, b.jsonl], weight: 0.5}`.")]
        value = values[item.name] if item.name in values else _default(item)
        lines.append(f"{item.name}:\n" if value is MISSING else _dumped(item.name, value))
        blocks.append("".join(lines))
    return "\n".join(blocks)


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as plain YAML, with folders and texts seen from anywhere."""
    here = [Path.cwd()]
    out = anchor_sources(values, here)
    if out["seed"] is None:
        del out["seed"]
    texts = out.get("domain_text")
    if isinstance(texts, Mapping):
        anchored = domain_texts_of("command", texts, here, "domain_text")
        out["domain_text"] = {text.name: plain_values(text) for text in anchored}
    if isinstance(out.get("experts"), Mapping):
        specs = out["experts"].items()
        out["experts"] = {name: spec["model"] if list(spec) == ["model"] else spec for name, spec in specs}
    return out


def _default(item: Field[Any]) -> Any:
    """Return a field's default; `MISSING` where it has none."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _comment_of_spec() -> str:
    descriptions = field_descriptions(ExpertSpec)
    defaults = {item.name: _default(item) for item in fields(ExpertSpec)}
    lines = ["code:"]
    for name, value in {**defaults, "model": "org/llama-code"}.items():
        lines.append(f"  {_dumped(name, value).strip()}  # {descriptions[name]}")
    return "".join(f"#   {line}\n" for line in lines)


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False))


def _dumped(key: str, value: Any) -> str:
    dumped: str = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10**6)
    return dumped

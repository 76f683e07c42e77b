"""What cards say of a training, and the whole card of a branch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from btx_merge.model.card import (
    CITATION,
    PAPER,
    how_to_use,
    markdown_table,
    project_link,
    take_over_terms,
    with_metadata,
)
from btx_merge.model.files import BRANCH, PICTURE
from btx_merge.model.held_out import OF_THIS_MODEL
from btx_merge.sources.cards import code_in_card, hub_link, in_card
from btx_merge.sources.locate import Located

_TRAINED = {
    "all": "All weights were trained.",
    "ff": "Its feed-forward blocks were trained; every other weight is the seed's own, to the byte.",
}
_LOSSES = {
    "loss": "loss",
    "lm_loss": "LM loss",
    "teacher_loss": "teacher's loss",
    "aux_loss": "balancing loss",
    "dead_experts": "dead experts",
}
"""What is logged, and what the card calls it."""
_TAUGHT = "\nEach domain was taught by its own source, whose divergence from the model joined the loss."


def training_section(verb: str, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Write what a card says of a run: what was trained, on what mixture, with which curve.

    Args:
        verb: the command's.
        entry: the record of the run.
        history: what was logged.
    """
    arguments = entry["arguments"]
    taught = _TAUGHT if entry.get("teacher") else ""
    return f"""## Training

`btx {verb} --train {entry["train"]}`: {entry["trained_parameters"]:,} parameters, {entry["steps"]} steps,
{entry["tokens"]:,} tokens in windows of {entry["max_length"]}, learning rate {arguments["learning_rate"]:g}.{taught}

{OF_THIS_MODEL}

{_mixture(entry)}
{_curve(history)}
![the curves of the run]({PICTURE})
"""


def _mixture(entry: Mapping[str, Any]) -> str:
    """Write the table of the domains, with what their held-out text costs before and after."""
    held_out = entry["held_out_perplexity"]
    total = sum(domain["weight"] for domain in entry["data"])
    rows = []
    for domain in entry["data"]:
        name, texts = domain["name"], ", ".join(map(code_in_card, domain["references"]))
        before, after = held_out["before"].get(name), held_out["after"].get(name)
        rows.append([name, texts, f"{domain['weight'] / total:.0%}", _figure(before), _figure(after)])
    return markdown_table(["domain", "texts", "share", "held-out perplexity before", "after"], rows)


def _curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Write the table of the losses at some ten steps, evenly apart, and at the last."""
    logged = [item for item in history if "loss" in item]
    apart = max(1, math.ceil(len(logged) / 10))
    shown = logged[::apart]
    if logged and shown[-1] is not logged[-1]:
        shown.append(logged[-1])
    keys = [key for key in _LOSSES if logged and key in logged[-1]]
    rows = [[str(item["step"]), *(_figure(item.get(key)) for key in keys)] for item in shown]
    return markdown_table(["step", *(_LOSSES[key] for key in keys)], rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def branch_card(seed: Located, entry: Mapping[str, Any]) -> str:
    """Return README.md of a branch but for its training: where it comes from, and how to use it.

    Args:
        entry: the record of the run.
    """
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata["tags"] = ["llama", "branch-train-mix"]
    if seed.repo_id:
        metadata |= {"base_model": [seed.repo_id], "base_model_relation": "finetune"}
    take_over_terms(metadata, seed)
    name = f"{code_in_card(seed.public_name)}, a local folder"
    if seed.repo_id:
        name = hub_link(seed.repo_id, seed.revision)
    domains = ", ".join(domain["name"] for domain in entry["data"])
    body = f"""
# {in_card(seed.public_name.rpartition("/")[2])}, a branch for {domains}

A copy of a seed, trained by itself on one part of the data, to become an expert of a Mixture of Experts
([Branch-Train-MiX]({PAPER})). Made by {project_link()} {version("btx-merge")}.

- Seed: {name}.
- Domains: {domains}.
- {_TRAINED[entry["train"]]}
- The run, with all settings: `{BRANCH}`.

{how_to_use()}
{CITATION}"""
    return with_metadata(metadata, body)


def branch_section(seed: Located, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Write what the card of a branch, or of an adapter that is one, says of the run and of what comes next."""
    reference = seed.public_reference if seed.repo_id else "SEED"
    name = entry["data"][0]["name"] if len(entry["data"]) == 1 else "NAME"
    return f"""## Merge

```sh
btx merge --seed {reference} --expert {name}=. --expert OTHER=MODEL -o MERGED
```

{training_section("branch", entry, history)}"""

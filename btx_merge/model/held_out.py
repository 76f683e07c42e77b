"""Held-out figures of a model: a table in its card, and `model-index` in the card's metadata, which the Hub shows.

They hold for the model as it was measured. Whatever changes the model takes them out of the metadata, and the table,
which stays as history, then says that it is of an earlier model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


MODEL_INDEX = "model-index"
OF_THIS_MODEL = "Measured on held-out text, of this model:"
OF_AN_EARLIER_ONE = "Measured on held-out text, of the model as it was then; it has been changed since:"
_TASK = "text-generation"


def router_results(layers: Sequence[LayerFit], domains: Iterable[str]) -> list[EvalResult]:
    """Return how well the routers that were fitted on these domains' text find a token's own expert."""
    from huggingface_hub import EvalResult

    if not layers:
        return []
    mean = sum(layer.accuracy for layer in layers) / len(layers)
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type="held-out-text",
            dataset_name=f"held-out text ({', '.join(domains)})",
            metric_type="accuracy",
            metric_value=round(mean, 4),
            metric_name="Router accuracy, mean of the layers",
        )
    ]


def training_results(entry: Mapping[str, Any]) -> list[EvalResult]:
    """Return the perplexity of each domain's held-out text after a finetuning, and before it."""
    from huggingface_hub import EvalResult

    results = []
    scores = entry["held_out_perplexity"]
    names = {"after": "Perplexity", "before": "Perplexity before the finetuning"}
    for domain in entry["data"]:
        for when, name in names.items():
            value = scores[when].get(domain["name"])
            if value is None or not math.isfinite(value):  # JSON, which the Hub makes of it, has no infinity
                continue
            result = EvalResult(
                task_type=_TASK,
                dataset_type=domain["name"],
                dataset_name=f"{domain['name']}, held-out text",
                metric_type="perplexity",
                metric_value=float(f"{value:.5g}"),
                metric_name=name,
            )
            results.append(result)
    return results


def model_index(name: str, results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Return the results as the Hub wants them in a card's metadata, under the model's name."""
    from huggingface_hub.repocard_data import eval_results_to_model_index

    return eval_results_to_model_index(name, list(results))


def router_table(layers: Sequence[LayerFit]) -> str:
    """Return a table, a line for each layer, of how its router came out."""
    rows = [
        f"| {layer.layer} | {layer.accuracy:.1%} | {layer.error:.4g} | {layer.temperature:g} |" for layer in layers
    ]
    head = "| layer | tokens that go to their own domain's expert first | relative error of the output | temperature |"
    return "\n".join([OF_THIS_MODEL, "", head, "|---|---|---|---|", *rows]) + "\n"


@dataclass(frozen=True)
class LayerFit:
    """How a layer's router was fitted."""

    layer: int
    """The layer's number, from 0."""
    temperature: float
    """Factor on the regression's solution, by which router logits become sharp."""
    accuracy: float
    """Part of held-out tokens whose likeliest expert is their domain's."""
    error: float
    """Squared distance of what the experts add from what they should, relative to that, on held-out tokens."""

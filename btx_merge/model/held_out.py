"""Held-out figures of a model: a table in its card, and `model-index` in the card's metadata, which the Hub shows.

They hold for the model as it was measured. Whatever changes the model takes them out of the metadata, and the table,
which stays as history, then says that it is of an earlier model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from btx_merge.model.card import markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


MODEL_INDEX = "model-index"
OF_THIS_MODEL = "Measured on held-out text, of this model:"
OF_AN_EARLIER_ONE = "Measured on held-out text, of the model as it was then; it has been changed since:"
_TASK = "text-generation"
_LITTLE = 0.01
"""Part of a model's bits per byte that is not worth a word: held-out windows of a fit tell no less apart."""


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


def fit_tables(fitted: Fitted) -> str:
    """Return tables of how a fit came out: by layer, and by domain what was lost and where."""
    text = OF_THIS_MODEL + "\n"
    if fitted.layers:
        columns = ["layer", "tokens that go to their own domain's expert first", "relative error of the output"]
        rows = []
        for layer in fitted.layers:
            errors = f"{layer.error:.4g}", f"{layer.own_error:.4g}"
            rows.append([str(layer.layer), f"{layer.accuracy:.1%}", *errors, f"{layer.temperature:g}"])
        columns += ["with every token at its own domain's expert", "temperature"]
        text += "\n" + markdown_table(columns, rows)
    if fitted.losses:
        rows = []
        for loss in fitted.losses:
            source = "" if loss.source is None else f"{loss.source:.3f}"
            rows.append([loss.domain, source, f"{loss.own_expert:.3f}", f"{loss.routed:.3f}"])
        columns = ["bits per byte", "the domain's own source", "every token at its own domain's expert", "as it is"]
        text += f"\n{markdown_table(columns, rows)}\n{fit_advice(fitted.losses)}\n"
    return text


def fit_advice(losses: Sequence[DomainLoss]) -> str:
    """Return one line: what the mean domain has lost, where, and which verb helps."""
    routing = sum(loss.lost_by_routing for loss in losses) / len(losses)
    parts = [loss.lost_by_sharing for loss in losses if loss.lost_by_sharing is not None]
    sharing = sum(parts) / len(parts) if parts else 0.0
    lost = _lost_by("the routers", routing)
    if parts:
        lost = f"{_lost_by('the weights that experts share', sharing)}; {lost}"
    if max(sharing, routing) < _LITTLE * sum(loss.routed for loss in losses) / len(losses):
        return f"{lost}: next to nothing."
    if sharing >= routing:
        return f"{lost}. Branches that share them with the seed lose nothing there (`btx branch --train ff`)."
    return f"{lost}. Fit them on more text, or train them (`btx train`)."


def _lost_by(what: str, bits: float) -> str:
    """Say what is lost, or gained: two experts together can be better than the domain's own."""
    return f"{abs(bits):.3f} bits per byte are {'lost' if bits > -0.0005 else 'gained'} by {what}"


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
    """Squared distance of what the experts add from what they should, relative to that, on held-out tokens. Each token
    counts relative to its state, as the next norm sees it."""
    own_error: float
    """The same with every token at its own domain's expert."""


@dataclass(frozen=True)
class DomainLoss:
    """What a domain's held-out text costs after a fit, in bits per byte."""

    domain: str
    """The domain's name."""
    own_expert: float
    """By the model, with every token at its own domain's expert: as good as routers can make it."""
    routed: float
    """By the model as it is."""
    source: float | None = None
    """By the domain's own source; None where it is not at hand, as in a fit of a model that exists."""

    @property
    def lost_by_sharing(self) -> float | None:
        """What is lost because all experts share the other weights."""
        return None if self.source is None else self.own_expert - self.source

    @property
    def lost_by_routing(self) -> float:
        """What is lost because tokens go to other experts than their domain's."""
        return self.routed - self.own_expert


@dataclass(frozen=True)
class Fitted:
    """How a fit came out on held-out windows of its own text."""

    layers: tuple[LayerFit, ...] = ()
    """By layer, of routers that were fitted on text."""
    losses: tuple[DomainLoss, ...] = ()
    """By domain; empty where nothing was held out, or where no token passed because statistics were kept."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as records and reports hold them."""
        return {key: [asdict(item) for item in items] for key, items in vars(self).items()}

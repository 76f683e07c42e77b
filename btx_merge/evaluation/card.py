"""The figures of an evaluation in the model's own card: a section with tables and picture, and `model-index`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.evaluation.files import described
from btx_merge.evaluation.picture import draw
from btx_merge.evaluation.report import MODEL, EvalReport
from btx_merge.files.folder import checked, read_text
from btx_merge.files.scratch import scratch_folder
from btx_merge.model.card import with_metadata
from btx_merge.model.card_update import bare_card, title_of, with_section, without_section
from btx_merge.model.files import EVALUATION
from btx_merge.model.held_out import MODEL_INDEX, OF_THIS_MODEL, model_index
from btx_merge.sources.cards import front_matter

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TITLE = "## Evaluation"
_METRICS = {"bits_per_byte": "Bits per byte", "perplexity": "Perplexity by btx eval"}
"""Field of a score to its name in metadata. The perplexity of a finetuning, of other windows, stands beside it."""


def update_card(report: EvalReport, folder: Path) -> None:
    """Put an evaluation into the card of the model in a folder, in the place of an earlier one, and the picture there.

    Raises:
        InputError: a card that may not be read.
        OSError: the disk refused.
    """
    card = folder / "README.md"
    text = read_text(checked(card)) if os.path.lexists(card) else ""
    with scratch_folder(folder.parent) as scratch:
        (scratch / "README.md").write_text(evaluated_card(text, report), encoding="utf-8")
        draw(report, scratch / EVALUATION)
        for name in (EVALUATION, "README.md"):  # the card names the picture
            os.replace(scratch / name, folder / name)


def evaluated_card(text: str, report: EvalReport) -> str:
    """Return a card with the evaluation. What else is measured of this model stays.

    Args:
        text: the card as it was; empty where there was none.
    """
    metadata, body = front_matter(text or bare_card())
    section = f"{TITLE}\n\n{OF_THIS_MODEL}\n\n{described(report)}"
    body = with_section(without_section(body, TITLE), section)
    if not metadata:  # there is none, or none that can be read: what its author wrote is left alone
        return body
    results = _kept_results(metadata) + results_of(report)
    index = model_index(title_of(body), results)
    return with_metadata({**metadata, MODEL_INDEX: index}, body)


def results_of(report: EvalReport) -> list[EvalResult]:
    """Return the merged model's figures as the Hub wants them."""
    from huggingface_hub import EvalResult

    results = []
    scores = next(row.scores for row in report.rows if row.kind == MODEL)
    for domain, score in scores.items():
        for metric, name in _METRICS.items():
            value: float = getattr(score, metric)
            if math.isfinite(value):  # JSON, which the Hub makes of it, has no infinity
                result = EvalResult(
                    task_type="text-generation",
                    dataset_type=domain,
                    dataset_name=f"{domain}, held-out text",
                    metric_type=metric,
                    metric_value=float(f"{value:.5g}"),
                    metric_name=name,
                )
                results.append(result)
    return results


def _kept_results(metadata: Mapping[str, Any]) -> list[EvalResult]:
    """Return the other results in a card, but for those of an earlier evaluation; none where they cannot be read."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    index = metadata.get(MODEL_INDEX)
    if not index:
        return []
    try:
        _, results = model_index_to_eval_results(index)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return [result for result in results if result.metric_name not in _METRICS.values()]

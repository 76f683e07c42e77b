"""The recipe of a look at a model's routing: the model, the texts, how much of them, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.errors import InputError
from btx_merge.texts.references import ONE_DOMAIN, DomainText, as_domain_texts
from btx_merge.values import Rule, at_least, one_of, parse_field, value_problems

RULES: dict[str, Rule] = {
    "model": ("a merged checkpoint", bool),
    "tokens": at_least(0),
    "window": at_least(1),
    "batch_size": at_least(1),
    "dtype": one_of(SAFETENSORS_NAMES),
    "page_tokens": at_least(0),
}


@dataclass(frozen=True)
class RoutingRecipe:
    """Everything that determines what is measured of a model's routing.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    model: str
    """A merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    data: tuple[DomainText, ...] = ()
    """Held-out text of each domain: a file, a folder, a glob or a dataset of the Hub. The expert of a domain's name is
    its own."""
    against: str | None = None
    """A second merged checkpoint whose routing is shown beside the first one's: the model before a finetuning, or one
    that was trained without balancing. What experts are worth is measured of the first one alone."""
    tokens: int = 20_000
    """Most tokens of each domain that are measured, at least 0; only whole windows are. With 0 all of them."""
    window: int | None = None
    """Tokens of a window, at least 1. By default 1024, or the model's positions if these are fewer."""
    batch_size: int = 8
    """Windows of full length that are computed together, at least 1; of shorter ones, more."""
    dtype: str | None = None
    """Dtype of the computation: float32, bfloat16 or float16. By default float32 on a CPU, the model's elsewhere."""
    ablation: bool = True
    """Measure what each expert is worth, with it switched off and with it alone. That takes two more passes over the
    texts for each expert, and so most of the time."""
    page_tokens: int = 20_000
    """Most tokens of all domains together that the page shows one by one, at least 0; fewer where layers times experts
    are more than 400. With 0 the page has the figures alone."""

    def __post_init__(self) -> None:
        problems = value_problems(self, RULES) + parse_field(self, "data", as_domain_texts, ONE_DOMAIN)
        if problems:
            raise InputError(problems)

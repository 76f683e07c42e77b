"""What is to be measured, and beside what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from btx_merge.errors import InputError, Problem, collecting
from btx_merge.reporting import short
from btx_merge.sources.source import as_spec
from btx_merge.texts.references import ONE_DOMAIN, DomainText, as_domain_texts
from btx_merge.values import Rule, at_least, is_whole, mapping_problems, one_of, parse_field, value_problems

DTYPES = ("float32", "bfloat16", "float16")
ROUTINGS = ("domain",)


@dataclass(frozen=True)
class EvalRecipe:
    """Everything that determines an evaluation: the model, the texts, and the models beside it.

    Raises:
        InputError: values that cannot be meant; all of them in one error.
    """

    model: str
    """A merged checkpoint: a folder, `org/name` or `org/name@revision`. Or any other causal language model that
    transformers loads without code from outside, such as a dense Llama; it was not merged, so it has no sources."""
    data: tuple[DomainText, ...] = ()
    """Held-out text of each domain: a file, a folder, a glob or a dataset of the Hub."""
    no_sources: bool = False
    """Leave out the seed and the experts, which the model's own recipe names."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where sources of the model's own recipe lie now, if they have moved."""
    soup: bool = False
    """Measure the dense mean of the sources too; it is made in memory."""
    against: Mapping[str, str] = field(default_factory=dict)
    """Further causal language models, of any kind that transformers loads without code from outside."""
    routing: str | None = None
    """domain: measure the merged model once more, every token sent to its own domain's expert, which has the domain's
    name. That is what a perfect router would reach. Blended experts are of no domain, so they are refused."""
    btm: tuple[int, ...] = ()
    """Branch-Train-Merge: experts that run side by side for a context, their distributions averaged; at least 1. Each
    number has a row of its own."""
    btm_text: tuple[DomainText, ...] = ()
    """Training text of each expert of Branch-Train-Merge, or some of it, by which experts are chosen for a context.
    Experts without text are left out."""
    tokens: int | None = None
    """Most tokens of each domain that are scored, at least 1; only whole windows are. By default all."""
    window: int | None = None
    """Tokens of a window, at least 1. By default 1024, or the model's positions if these are fewer."""
    batch_size: int = 4
    """Windows of full length that are computed together, at least 1; of shorter ones, more."""
    dtype: str | None = None
    """Dtype of all models: float32, bfloat16 or float16. By default float32 on a CPU, the merged model's elsewhere."""

    def __post_init__(self) -> None:
        problems = value_problems(self, RULES)
        expected = "`name: model`, one line for each"
        problems += mapping_problems("sources", self.sources, expected)
        problems += mapping_problems("against", self.against, expected) or self._name_problems()
        problems += parse_field(self, "data", as_domain_texts, ONE_DOMAIN)
        problems += parse_field(self, "btm_text", as_domain_texts)
        no_counts = parse_field(self, "btm", _as_counts)
        problems += no_counts
        if not no_counts and bool(self.btm) != bool(self.btm_text):
            found, other = ("btm", "btm_text") if self.btm_text else ("btm_text", "btm")
            problems.append(Problem("recipe", found, "missing", f"both, or {other} left out"))
        if self.no_sources and (self.soup or self.sources or self.btm):
            given = "soup" if self.soup else "sources" if self.sources else "btm"
            problems.append(Problem("recipe", given, "given without sources", "", "Leave out --no-sources."))
        if problems:
            raise InputError(problems)

    def _name_problems(self) -> list[Problem]:
        """Return what is wrong with the names of further models, which stand in tables as they are."""
        problems: list[Problem] = []
        for name, model in self.against.items():
            with collecting(problems):
                as_spec(name, model, "against")
        return problems


def _as_counts(value: Any, name: str) -> tuple[int, ...]:
    """Return whole numbers above 0, each of them once; one may stand by itself.

    Raises:
        InputError: anything else.
    """
    counts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for number, count in enumerate(counts):
        if not is_whole(count) or count < 1 or count in counts[:number]:
            found = f"{count} twice" if count in counts[:number] else short(count)
            raise InputError([Problem("recipe", name, found, "whole numbers of at least 1, each once")])
    return counts


RULES: dict[str, Rule] = {
    "tokens": at_least(1),
    "window": at_least(1),
    "batch_size": at_least(1),
    "dtype": one_of(DTYPES),
    "routing": one_of(ROUTINGS),
}

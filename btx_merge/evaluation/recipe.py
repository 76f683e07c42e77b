"""What is to be measured, and beside what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from btx_merge.errors import InputError, Problem
from btx_merge.sources.source import as_spec
from btx_merge.texts.references import DomainText, as_domain_texts
from btx_merge.values import Rule, at_least, mapping_problems, one_of, value_problems

DTYPES = ("float32", "bfloat16", "float16")
ROUTINGS = ("domain",)


@dataclass(frozen=True)
class EvalRecipe:
    """Everything that determines an evaluation: the model, the texts, and the models beside it.

    Raises:
        InputError: values that cannot be meant; all of them in one error.
    """

    model: str
    """The merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    data: tuple[DomainText, ...] = ()
    """Held-out text by domain: files, folders, globs or datasets of the Hub. Also by name: a mapping."""
    no_sources: bool = False
    """Whether to leave out the seed and the experts, which the model's own recipe names."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source of the model's own recipe to where it lies now; only those that have moved."""
    soup: bool = False
    """Whether to measure the dense mean of the sources, made in memory."""
    against: Mapping[str, str] = field(default_factory=dict)
    """Name to a further causal language model, of any kind that transformers loads without code from outside."""
    routing: str | None = None
    """domain: the merged model is measured once more with every token sent to its own domain's expert, the expert of
    the domain's name. That is what a perfect router would reach."""
    tokens: int | None = None
    """Tokens of each domain that are scored, at most, in whole windows; all where not given."""
    window: int | None = None
    """Tokens of a window; 1024, or the model's positions where these are fewer."""
    batch_size: int = 4
    """Windows of full length that are computed together; of shorter ones, more."""
    dtype: str | None = None
    """float32, bfloat16 or float16, for all models; float32 on a CPU, the model's own on other devices."""

    def __post_init__(self) -> None:
        problems = value_problems(self, RULES)
        expected = "`name: model`, one line for each"
        problems += mapping_problems("sources", self.sources, expected)
        problems += mapping_problems("against", self.against, expected) or self._name_problems()
        try:
            object.__setattr__(self, "data", as_domain_texts(self.data, "data"))
            if not self.data:
                problems.append(Problem("recipe", "data", "missing", "at least one domain, --data NAME=TEXT"))
        except InputError as error:
            problems += error.problems
        if self.no_sources and (self.soup or self.sources):
            given = "soup" if self.soup else "sources"
            problems.append(Problem("recipe", given, "given without sources", "", "Leave out --no-sources."))
        if problems:
            raise InputError(problems)

    def _name_problems(self) -> list[Problem]:
        """Return what is wrong with the names of further models, which stand in tables as they are."""
        problems: list[Problem] = []
        for name, model in self.against.items():
            try:
                as_spec(name, model, "against")
            except InputError as error:
                problems += error.problems
        return problems


RULES: dict[str, Rule] = {
    "tokens": at_least(1),
    "window": at_least(1),
    "batch_size": at_least(1),
    "dtype": one_of(DTYPES),
    "routing": one_of(ROUTINGS),
}

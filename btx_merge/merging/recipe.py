"""What to merge and how: one frozen recipe, from Python, from a YAML file or from the command's flags.

Its values are validated here, all together; whether the sources fit each other is for `checks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.errors import InputError, Problem, collecting
from btx_merge.fitting.recipe import FIT_THROUGH, ROUTER_FITS, TEXT_ROUTERS
from btx_merge.merging.fits import REGMEAN_METHODS, fit_of_text
from btx_merge.merging.recipe_file import as_resolved, read_recipe_file
from btx_merge.reporting import short
from btx_merge.sources.source import SEED, ExpertSpec, as_spec
from btx_merge.texts.references import DomainText, as_domain_texts, as_prompts, plain_values
from btx_merge.values import (
    ABOVE_ZERO,
    RANDOM_SEED,
    SHARD_SIZE,
    Rule,
    at_least,
    one_of,
    parse_field,
    parse_size,
    path_as_text,
    unknown_problems,
    value_problems,
)

DIFFERENCE_METHODS = ("ties", "dare_ties", "dare_linear")
"""Ways to combine that work on differences from the seed."""

COMBINE_METHODS = ("mean", "weighted", "seed", "ties", "dare_ties", "dare_linear", *REGMEAN_METHODS)
HEADS = ("combined", "fitted")
EXPERT_MODES = ("whole", "split", "blend")
ROUTER_INITS = ("random", "zeros", *ROUTER_FITS)
ROUTER_TYPES = ("top_k", "switch", "soft", "sample_top_1")


@dataclass(frozen=True)
class MergeRecipe:
    """Everything that determines a merge (BTX, arXiv 2403.07816): the same recipe gives the same bytes.

    An expert may be given by its `model` alone, as text. A domain's text is a `DomainText`, one reference, a list of
    references, or a mapping with `text` and `weight`.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    seed: str
    """The model that all experts grew from: a folder, `org/name` or `org/name@revision`."""
    experts: Mapping[str, ExpertSpec] = field(default_factory=dict)
    """Experts by name, in the order of the merged model: checkpoints or PEFT adapters."""
    seed_expert: bool = True
    """Make the untouched seed an expert too: number 0, with the name seed."""
    seed_weight: float = 1.0
    """Weight of the seed where sources are weighted, relative to the experts'; a number, at least 0."""
    combine: str = "mean"
    """How the weights outside the feed-forward blocks are combined. mean: their average, as in the paper;
    weighted: an average by weights; seed: the seed's own; ties, dare_ties, dare_linear: sparse differences from
    the seed, added to it; regmean, regmean_merged: fitted on `domain_text`, to the inputs in the sources or in the
    merged model."""
    head: str = "combined"
    """What becomes of the language modelling head. combined: it is combined like all else, or is the embedding where
    all sources tie them; fitted: the result has a head of its own in any case, each row fitted by how often each
    domain has its token (for regmean, regmean_merged)."""
    density: float = 0.8
    """ties, dare_*: part of each difference from the seed that is kept, in (0, 1]."""
    scale: float = 1.0
    """ties, dare_*: factor on the combined difference before it is added to the seed; a finite number."""
    expert_mode: str = "whole"
    """What an expert consists of. whole: one source's feed-forward blocks; split: one of the `num_chunks` parts
    that each source's are cut into; blend: one part of every source's."""
    num_chunks: int = 2
    """split: experts that each source is cut into; at least 1, and a divisor of intermediate_size."""
    fold_norms: bool = False
    """Multiply each expert's gate and up projections by its own post-attention norm over the merged one, so that
    it sees the inputs that it was trained on."""
    router_init: str = "random"
    """How the routers begin. random: normal with `router_std`; zeros: every expert equally likely; ridge, logistic:
    ridge or multinomial logistic regression, fitted on `domain_text`; prompts: fitted on `prompts`."""
    router_std: float | None = None
    """Standard deviation of random routers, above 0. By default the seed's initializer_range."""
    random_seed: int = 0
    """Seed of random routers and of the weights that DARE drops, in [0, 2**32)."""
    domain_text: Mapping[str, DomainText] = field(default_factory=dict)
    """Text of each expert's domain, for what is fitted: a file, a folder, a glob or a dataset of the Hub. The seed
    may go without. If nothing else asks for a fit, text does: `combine` regmean_merged, `head` fitted,
    `router_init` logistic and `fit_through` router, where they are not given."""
    domain_tokens: int = 200_000
    """Tokens that are read of each domain, from the beginning of its text; at least 64."""
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A few typical lines of each expert, for routers that begin with prompts."""
    router_ridge: float = 0.001
    """ridge: penalty on the router's weights, relative to the mean square of its input; above 0."""
    regmean_ridge: float = 0.01
    """regmean, regmean_merged: penalty on the distance from the mean, relative to the mean square of the input;
    above 0."""
    fit_through: str = "expert"
    """Experts that tokens pass on the way to the next layer during a fit. expert: their own domain's; router:
    those that the fitted router chooses."""
    router_type: str = "top_k"
    """How a router chooses among experts. top_k: the `num_experts_per_tok` likeliest; switch: the likeliest,
    weighted by its probability; soft: all of them; sample_top_1: one drawn at random in training, otherwise the
    likeliest. It can be changed later, in config.json."""
    router_pre_softmax: bool = False
    """top_k: take the softmax before the selection, scaled so that identical experts give their dense layer. Made
    for split experts."""
    num_experts_per_tok: int = 2
    """top_k: experts that each token is sent to (K), at least 1."""
    router_aux_loss_coef: float = 0.01
    """Coefficient of the load balancing loss in training (the paper's alpha), at least 0."""
    dtype: str | None = None
    """Dtype of the result: bfloat16, float16 or float32. By default the seed's."""
    max_shard_size: str = "5GB"
    """Largest weights file, a size such as 5GB, 500MB or 5GiB. GB counts in powers of ten, GiB in powers of two.
    """
    tokenizer_source: str = SEED
    """Source whose chat template, special tokens and generation config the result gets: seed, or an expert's name.
    """
    untie: bool = False
    """Take sources with tied and with untied embeddings together. The result then has a language modelling head of
    its own."""
    allow_nonfinite: bool = False
    """Go on even if a source holds NaN or Inf."""
    allow_unrelated: bool = False
    """Go on even if a source does not seem to have grown from the seed."""
    resolved: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Written by a merge, not by hand. Of its `sources`, name to digest, each must be the same model again."""

    def __new__(cls, *args: Any, **values: Any) -> MergeRecipe:
        """Remember which options are given, for those win over the fit that text alone asks for."""
        recipe = super().__new__(cls)
        names = [item.name for item in fields(cls)]
        object.__setattr__(recipe, "_given", (*names[: len(args)], *values))
        return recipe

    def __post_init__(self) -> None:
        given: tuple[str, ...] = self.__dict__.pop("_given")
        for key, value in fit_of_text({name: getattr(self, name) for name in given}).items():
            object.__setattr__(self, key, value)
        problems: list[Problem] = []
        specs = {}
        object.__setattr__(self, "seed", path_as_text(self.seed))
        if not isinstance(self.experts, Mapping):
            found = f"a {type(self.experts).__name__}"
            problems.append(Problem("recipe", "experts", found, "`name: model`, one line per expert"))
        for name, spec in self.experts.items() if not problems else ():
            with collecting(problems):
                specs[name] = as_spec(name, spec)
        object.__setattr__(self, "experts", specs)
        for key, parse in (("domain_text", _by_name), ("prompts", as_prompts), ("resolved", as_resolved)):
            problems += parse_field(self, key, parse)
        problems += value_problems(self, RULES)
        problems = problems or together_problems(self)
        if problems:
            raise InputError(problems)

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size) or 0

    @property
    def fits_shared(self) -> bool:
        """Whether shared weights are fitted on text."""
        return self.combine in REGMEAN_METHODS

    @property
    def has_own_head(self) -> bool:
        """Whether the result has a head of its own even where all sources are tied."""
        return self.head == "fitted"

    @property
    def is_fitted(self) -> bool:
        """Whether anything is fitted when the merge is written."""
        return self.fits_shared or self.router_init in ROUTER_FITS

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "recipe") -> MergeRecipe:
        """Make a recipe from plain values.

        Raises:
            InputError: an unknown key, a missing seed, or a value that cannot be meant.
        """
        known = [item.name for item in fields(cls)]
        problems = unknown_problems(origin, values, known)
        try:
            recipe = cls(**{"seed": "", **{key: value for key, value in values.items() if key in known}})
        except InputError as error:
            problems += [replace(problem, source=origin) for problem in error.problems]
        if problems:
            raise InputError(problems)
        return recipe

    @classmethod
    def from_yaml(cls, file: str | Path, **overrides: Any) -> MergeRecipe:
        """Read a recipe from a YAML file; `overrides` win over the file. Relative folders are the file's."""

        def is_given(name: str) -> bool:
            return (SEED if name == SEED else "experts") in overrides

        return cls.from_dict({**read_recipe_file(file, is_given=is_given), **overrides}, str(file))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which `from_dict` takes back; without `resolved`, which does not say what is merged."""
        texts = {name: plain_values(text) for name, text in self.domain_text.items()}
        prompts = {name: list(lines) for name, lines in self.prompts.items()}
        values = {**asdict(self), "domain_text": texts, "prompts": prompts}
        del values["resolved"]
        return values


def _by_name(values: Any, key: str) -> dict[str, DomainText]:
    return {text.name: text for text in as_domain_texts(values, key)}


RULES: dict[str, Rule] = {
    "seed": ("the model that all experts grew from", bool),
    "seed_weight": ("a number, at least 0", lambda value: 0 <= value < math.inf),
    "combine": one_of(COMBINE_METHODS),
    "head": one_of(HEADS),
    "density": ("in (0, 1]", lambda value: 0 < value <= 1),
    "scale": ("a finite number", math.isfinite),
    "expert_mode": one_of(EXPERT_MODES),
    "num_chunks": at_least(1),
    "router_init": one_of(ROUTER_INITS),
    "router_std": ABOVE_ZERO,
    "domain_tokens": at_least(64),
    "router_ridge": ABOVE_ZERO,
    "regmean_ridge": ABOVE_ZERO,
    "fit_through": one_of(FIT_THROUGH),
    "random_seed": RANDOM_SEED,
    "router_type": one_of(ROUTER_TYPES),
    "num_experts_per_tok": at_least(1),
    "router_aux_loss_coef": at_least(0),
    "dtype": one_of(SAFETENSORS_NAMES),
    "max_shard_size": SHARD_SIZE,
}


def together_problems(recipe: MergeRecipe) -> list[Problem]:
    """Return what does not go together, of values that are right one by one."""
    problems = []

    def problem(key: str, found: str, expected: str, remedy: str = "") -> None:
        problems.append(Problem("recipe", key, found, expected, remedy))

    sources = len(recipe.experts) + recipe.seed_expert
    experts = sources * recipe.num_chunks if recipe.expert_mode == "split" else sources
    if not recipe.experts and recipe.num_experts_per_tok > experts:
        problem("experts", "none", "at least one", "Give --expert NAME=MODEL.")
    elif recipe.num_experts_per_tok > experts:
        expected = f"in [1, {experts}], for there are {experts} experts" if experts > 1 else "1, for there is 1 expert"
        problem("num_experts_per_tok", f"{recipe.num_experts_per_tok}", expected, "Give --num-experts-per-tok.")
    names = (SEED, *recipe.experts)
    if recipe.tokenizer_source not in names:
        problem("tokenizer_source", short(recipe.tokenizer_source), f"one of {', '.join(names)}")
    weights = [spec.weight for spec in recipe.experts.values()] + [recipe.seed_weight] * recipe.seed_expert
    if sources and not sum(weights) > 0:
        problem("weight", "all are 0", "at least one above 0")
    elif (recipe.combine in ("mean", "seed") or recipe.fits_shared) and set(weights) - {1.0}:
        remedy = "Say combine: weighted (or ties, dare_ties, dare_linear), or leave the weights out."
        problem("weight", f"weights, which combine: {recipe.combine} ignores", "", remedy)
    return problems + _fit_problems(recipe)


def _fit_problems(recipe: MergeRecipe) -> list[Problem]:
    """Check that what is fitted has its text, and that no text is given in vain."""
    problems = []
    needs_text = recipe.fits_shared or recipe.router_init in TEXT_ROUTERS
    needs_prompts = recipe.router_init == "prompts"
    known = dict.fromkeys((*((SEED,) if recipe.seed_expert else ()), *recipe.experts))
    for key, flag, given, needed in (
        ("domain_text", "--domain-text {}=FILE", recipe.domain_text, needs_text),
        ("prompts", "--prompt {}=TEXT", recipe.prompts, needs_prompts),
    ):
        problems += [
            Problem("recipe", f"{key}.{name}", f"no expert {name}", f"one of {', '.join(known)}")
            for name in given
            if name not in known
        ]
        missing = [name for name in recipe.experts if name not in given]
        if needed and missing:
            remedy = "Give " + ", ".join(flag.format(name) for name in missing) + "."
            expected = "for every expert but the seed, which may go without"
            problems.append(Problem("recipe", key, f"none for {', '.join(missing)}", expected, remedy))
        elif given and not needed:
            remedy = "Leave out combine or router_init, for which the best is taken then; or leave out the text."
            remedy = "Say router_init: prompts, or leave them out." if key == "prompts" else remedy
            problems.append(Problem("recipe", key, "given, but nothing is fitted on it", "", remedy))
    if recipe.has_own_head and not recipe.fits_shared:
        found, expected = f"fitted, with combine: {recipe.combine}", f"combine: {' or '.join(REGMEAN_METHODS)}"
        problems.append(Problem("recipe", "head", found, expected, "Say combine: regmean_merged, or leave it out."))
    if recipe.is_fitted and recipe.expert_mode == "blend":
        remedy = "Choose whole or split, or fit nothing."
        problems.append(Problem("recipe", "expert_mode", "blend", "experts that belong to a domain", remedy))
    return problems

"""The recipes of `train` and `branch`: the model, what is trained, on which texts, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import short
from btx_merge.texts.references import ONE_DOMAIN, DomainText, as_domain_texts
from btx_merge.values import ABOVE_ZERO, Rule, at_least, mapping_problems, one_of, parse_field, value_problems

TRAIN_MODES = ("routers", "shared", "all", "lora")
TEACHERS = ("sources",)
LORA_TARGETS = {"routers": "routers", "shared": "routers + shared", "experts": "experts"}
BRANCH_MODES = ("all", "ff", "lora")
BRANCH_LORA_TARGETS = ("ff", "all")

_OF_BOTH: dict[str, Rule] = {
    "max_length": at_least(2),
    "holdout": ("in [0, 0.5]", lambda value: 0 <= value <= 0.5),
    "shuffle": at_least(1),
    "lora_r": at_least(1),
    "lora_alpha": ABOVE_ZERO,
    "fsdp_size": at_least(1),
}
RULES: dict[str, Rule] = {
    **_OF_BOTH,
    "model": ("a merged checkpoint", bool),
    "train": one_of(TRAIN_MODES),
    "router_grad": one_of(("sparse", "dense")),
    "router_aux_loss_coef": at_least(0),
    "router_aux_loss_scope": one_of(("global_batch", "micro_batch")),
    "teacher": one_of(TEACHERS),
    "lora_target": one_of(LORA_TARGETS),
    "ep_size": at_least(1),
}
BRANCH_RULES: dict[str, Rule] = {
    **_OF_BOTH,
    "model": ("a dense Llama", bool),
    "train": one_of(BRANCH_MODES),
    "lora_target": one_of(BRANCH_LORA_TARGETS),
}


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that determines a finetuning. Texts may be a mapping as in `MergeRecipe`.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    model: str
    """A merged checkpoint: a folder, `org/name` or `org/name@revision`."""
    data: tuple[DomainText, ...] = ()
    """Texts to train on, by domain: a file, a folder, a glob or a dataset of the Hub. Domains are mixed by their
    weights."""
    train: str = "shared"
    """What is trained. routers: nothing else; shared: routers and all that was averaged, while experts stay as
    they are; all: every weight; lora: an adapter."""
    max_length: int | None = None
    """Tokens of a window, at least 2 and at most the model's positions. By default 1024, or the positions if these are
    fewer."""
    holdout: float = 0.02
    """Part of each domain's documents that is scored and not trained on, in [0, 0.5]."""
    shuffle: int = 256
    """Windows of each domain among which the next one is drawn at random, at least 1."""
    router_grad: str | None = None
    """How routers learn. sparse: from the chosen experts; dense: from all, which costs more. By default as the
    model's config says."""
    router_aux_loss_coef: float | None = None
    """Coefficient of the load balancing loss, at least 0. By default the model's."""
    router_aux_loss_scope: str = "global_batch"
    """Tokens over which the load is balanced. global_batch: those of all ranks and accumulated micro-batches;
    micro_batch: those of each micro-batch."""
    teacher: str | None = None
    """sources: each domain's text is taught by the source of its name, too: the divergence from what that source
    predicts joins the loss. By default nobody teaches."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """teacher: where sources of the model's own recipe lie now, if they have moved."""
    lora_target: str = "shared"
    """lora: what gets an adapter. routers: these alone; shared: routers and attention; experts: these alone."""
    lora_r: int = 16
    """lora: rank of the adapter, at least 1."""
    lora_alpha: float = 32
    """lora: what is learned is multiplied by lora_alpha / lora_r; above 0."""
    fsdp_size: int = 1
    """Ranks that the parameters are sharded over (FSDP2), at least 1: one, or all of them."""
    ep_size: int = 1
    """Ranks that the experts are spread over (expert parallelism), at least 1; a divisor of `fsdp_size`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `transformers.TrainingArguments`, by name. `max_steps` must be there."""

    def __post_init__(self) -> None:
        problems = _problems(self, RULES)
        problems += mapping_problems("sources", self.sources, "`name: model`, one line for each")
        if self.sources and self.teacher is None:
            problems.append(Problem("recipe", "sources", "given without a teacher", "", "Give --teacher sources."))
        if not problems and self.fsdp_size % self.ep_size:
            found, remedy = f"{self.ep_size} with fsdp_size {self.fsdp_size}", "Give --fsdp-size, the number of ranks."
            problems.append(Problem("recipe", "ep_size", found, "a divisor of fsdp_size", remedy))
        if problems:
            raise InputError(problems)


@dataclass(frozen=True)
class BranchRecipe:
    """Everything that determines a branch: one copy of a seed, trained by itself to become an expert.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    model: str
    """The seed, a dense Llama: a folder, `org/name` or `org/name@revision`."""
    data: tuple[DomainText, ...] = ()
    """Texts to train on, by domain, of which a branch has one as a rule: a file, a folder, a glob or a dataset of the
    Hub. Several domains are mixed by their weights."""
    train: str = "all"
    """What is trained. all: every weight, as in the paper; ff: feed-forward blocks alone, so that all that a merge
    averages stays the seed's; lora: an adapter."""
    max_length: int | None = None
    """Tokens of a window, at least 2 and at most the model's positions. By default 1024, or the positions if these are
    fewer."""
    holdout: float = 0.02
    """Part of each domain's documents that is scored and not trained on, in [0, 0.5]."""
    shuffle: int = 256
    """Windows of each domain among which the next one is drawn at random, at least 1."""
    lora_target: str = "ff"
    """lora: what gets an adapter. ff: feed-forward blocks alone; all: attention, too."""
    lora_r: int = 16
    """lora: rank of the adapter, at least 1."""
    lora_alpha: float = 32
    """lora: what is learned is multiplied by lora_alpha / lora_r; above 0."""
    fsdp_size: int = 1
    """Ranks that the parameters are sharded over (FSDP2), at least 1: one, or all of them."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `transformers.TrainingArguments`, by name. `max_steps` must be there."""

    def __post_init__(self) -> None:
        if problems := _problems(self, BRANCH_RULES):
            raise InputError(problems)


Recipe = TrainRecipe | BranchRecipe


def _problems(recipe: Recipe, rules: Mapping[str, Rule]) -> list[Problem]:
    """Return what is wrong with a recipe's values, and give it its texts in their usual form."""
    problems = value_problems(recipe, rules) + parse_field(recipe, "data", as_domain_texts, ONE_DOMAIN)
    if not isinstance(recipe.arguments, Mapping) or not all(isinstance(name, str) for name in recipe.arguments):
        problems.append(Problem("recipe", "arguments", short(recipe.arguments), "`name: value`"))
    if recipe.train == "lora" and not problems and max(sharded_over(recipe).values()) > 1:
        found, remedy = "lora on sharded parameters", "Leave --fsdp-size out: each rank then has a copy of the model."
        problems.append(Problem("recipe", "train", found, "", remedy))
    return problems


def sharded_over(recipe: Recipe) -> dict[str, int]:
    """Return how many ranks parameters, and the experts of a merged model, are spread over."""
    sizes = {"fsdp_size": recipe.fsdp_size}
    return {**sizes, "ep_size": recipe.ep_size} if isinstance(recipe, TrainRecipe) else sizes


def option_names(recipe: type[TrainRecipe] | type[BranchRecipe]) -> tuple[str, ...]:
    """Return the names of a recipe's own options: neither the model, nor the texts, nor the Trainer's arguments."""
    return tuple(item.name for item in fields(recipe) if item.name not in ("model", "data", "arguments"))

"""What to merge and how: one frozen recipe, from Python, from a YAML file or from the command's flags.

Its values are validated here, all together; whether the sources fit each other is for `checks`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from btx_merge.dtypes import SAFETENSORS_NAMES
from btx_merge.errors import InputError, Problem

COMBINE_METHODS = ("mean", "weighted", "seed", "ties", "dare_ties", "dare_linear")
EXPERT_MODES = ("whole", "split", "blend")
ROUTER_INITS = ("random", "zeros")
SEED = "seed"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert of the recipe."""

    model: str
    """A folder, a Hub id `org/name` or `org/name@revision`; a checkpoint or a PEFT adapter."""
    weight: float = 1.0
    """Its share when the combining is weighted, relative to the others'. At least 0."""
    base: str | None = None
    """For an adapter: the model it was trained on, where that is not the seed."""


@dataclass(frozen=True)
class MergeRecipe:
    """Everything that determines a merge (BTX, arXiv 2403.07816): the same recipe gives the same bytes.

    Raises:
        InputError: a value that cannot be meant; all of them in one error.
    """

    seed: str
    """The model that all experts grew from: a folder, `org/name` or `org/name@revision`."""
    experts: Mapping[str, ExpertSpec] = field(default_factory=dict)
    """Name to expert, in the order of the merged model. A plain string stands for its `model`."""
    seed_expert: bool = True
    """Whether the seed itself is an expert: number 0, named `seed`, the generalist."""
    seed_weight: float = 1.0
    """The seed's share when the combining is weighted."""
    combine: str = "mean"
    """How all that is not a feed-forward block is combined: mean, weighted, seed, ties, dare_ties or dare_linear."""
    density: float = 0.8
    """ties, dare_*: the part of each difference from the seed that is kept, in (0, 1]."""
    scale: float = 1.0
    """ties, dare_*: factor on the combined difference before it is added to the seed."""
    expert_mode: str = "whole"
    """whole: one expert per source; split: each source cut into `num_chunks` experts; blend: chunks of all mixed."""
    num_chunks: int = 2
    """split: experts per source. A divisor of intermediate_size."""
    fold_norms: bool = False
    """Whether gate and up absorb the ratio of the source's own post-attention norm to the merged one."""
    router_init: str = "random"
    """random: normal with `router_std`; zeros: every expert equally likely."""
    router_std: float | None = None
    """Standard deviation of random routers; the seed's initializer_range where not given."""
    random_seed: int = 0
    """Seed of the random routers and of DARE's dropping."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to (K)."""
    router_aux_loss_coef: float = 0.01
    """Coefficient of the load balancing loss (the paper's alpha)."""
    dtype: str | None = None
    """bfloat16, float16 or float32; the seed's where not given."""
    max_shard_size: str = "5GB"
    """Largest file of weights, as `5GB` or `500MB` (powers of ten) or `5GiB` (powers of two)."""
    tokenizer_source: str = SEED
    """The source whose chat template, special tokens and generation config the result gets."""
    untie: bool = False
    """Whether tied and untied sources may be mixed; the result then has a head of its own."""
    allow_nonfinite: bool = False
    """Whether to go on where a source holds NaN or Inf."""
    allow_unrelated: bool = False
    """Whether to go on where a source does not seem to have grown from the seed."""

    def __post_init__(self) -> None:
        specs = {name: _as_spec(name, spec) for name, spec in dict(self.experts).items()}
        object.__setattr__(self, "experts", specs)
        if problems := _value_problems(self):
            raise InputError(problems)

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        size = _parse_size(self.max_shard_size)
        assert size is not None
        return size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "recipe") -> MergeRecipe:
        """A recipe from plain values.

        Raises:
            InputError: an unknown key, a missing seed, or a value that cannot be meant.
        """
        known = {item.name: item for item in fields(cls)}
        problems = [_unknown(origin, key, list(known)) for key in values if key not in known]
        if not values.get("seed"):
            problems.append(Problem(origin, "seed", "missing", "the model that all experts grew from"))
        if not isinstance(values.get("experts", {}), Mapping):
            problems.append(Problem(origin, "experts", "not a mapping", "`name: model`, one line per expert"))
        for key, value in values.items():
            default = known[key].default if key in known else MISSING
            if default is not MISSING and default is not None and not _same_kind(value, default):
                problems.append(Problem(origin, key, f"{value!r}", f"a {type(default).__name__}"))
        if problems:
            raise InputError(problems)
        return cls(**values)

    @classmethod
    def from_yaml(cls, file: str | Path, **overrides: Any) -> MergeRecipe:
        """A recipe from a YAML file; `overrides` win over the file. Relative folders are the file's."""
        return cls.from_dict({**read_recipe_file(file), **overrides}, str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` takes back."""
        return asdict(self)


def read_recipe_file(file: str | Path) -> dict[str, Any]:
    """The values of a recipe file, with the folders that it names relative to itself made absolute.

    Raises:
        InputError: the file is missing, is no YAML or no mapping.
    """
    path = Path(file)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError([Problem("recipe", str(file), error.strerror or str(error))]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError([Problem("recipe", str(file), f"not YAML: {reason}")]) from error
    if not isinstance(values, dict):
        raise InputError([Problem("recipe", str(file), "no keys", "at least `seed:` and `experts:`")])
    values.pop("resolved", None)  # what a merge wrote down about itself in btx_recipe.yaml

    def anchored(reference: Any) -> Any:
        beside = path.parent / reference if isinstance(reference, str) else None
        return str(beside.resolve()) if beside is not None and beside.is_dir() else reference

    values["seed"] = anchored(values.get("seed"))
    for name, spec in (values.get("experts") or {}).items() if isinstance(values.get("experts"), dict) else ():
        if isinstance(spec, dict):
            values["experts"][name] = {
                key: anchored(value) if key in ("model", "base") else value for key, value in spec.items()
            }
        else:
            values["experts"][name] = anchored(spec)
    return values


def _as_spec(name: str, spec: Any) -> ExpertSpec:
    if isinstance(spec, ExpertSpec):
        return spec
    if isinstance(spec, (str, Path)):
        return ExpertSpec(str(spec))
    known = [item.name for item in fields(ExpertSpec)]
    if not isinstance(spec, Mapping):
        raise InputError([Problem("recipe", f"experts.{name}", f"{spec!r}", "a model, or `model:` and `weight:`")])
    problems = [_unknown("recipe", f"experts.{name}.{key}", known) for key in spec if key not in known]
    if not spec.get("model"):
        problems.append(Problem("recipe", f"experts.{name}", "no model", "`model: folder or org/name`"))
    if problems:
        raise InputError(problems)
    return ExpertSpec(**spec)


def _unknown(origin: str, key: str, known: list[str]) -> Problem:
    near = difflib.get_close_matches(key.split(".")[-1].replace("-", "_"), known, 1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}."
    return Problem(origin, key, "unknown key", "", remedy)


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float)) if isinstance(default, float) else isinstance(value, type(default))


def _parse_size(text: str) -> int | None:
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    base = 1024 if "i" in text.lower() else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _value_problems(recipe: MergeRecipe) -> list[Problem]:
    problems = []

    def expect(ok: bool, key: str, expected: str, remedy: str = "") -> None:
        if not ok:
            value = getattr(recipe, key.split(".")[0])
            problems.append(Problem("recipe", key, f"{value!r}", expected, remedy))

    for name, spec in recipe.experts.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == SEED:
            expected = "letters, digits, `_`, `-`, `.`; not `seed`, which is the seed's own"
            problems.append(Problem("recipe", "experts", f"the name {name!r}", expected))
        if not isinstance(spec.weight, (int, float)) or spec.weight < 0:
            problems.append(Problem("recipe", f"experts.{name}.weight", f"{spec.weight!r}", "a number, at least 0"))
    sources = len(recipe.experts) + recipe.seed_expert
    if not recipe.experts and not recipe.seed_expert:
        problems.append(Problem("recipe", "experts", "none", "at least one", "Give --expert NAME=MODEL."))
    choices = {"combine": COMBINE_METHODS, "expert_mode": EXPERT_MODES, "router_init": ROUTER_INITS}
    for key, allowed in choices.items():
        expect(getattr(recipe, key) in allowed, key, f"one of {', '.join(allowed)}")
    expect(recipe.seed_weight >= 0, "seed_weight", "at least 0")
    expect(0 < recipe.density <= 1, "density", "in (0, 1]")
    expect(recipe.num_chunks >= 1, "num_chunks", "at least 1")
    expect(recipe.router_std is None or recipe.router_std > 0, "router_std", "above 0")
    expect(recipe.random_seed >= 0 and recipe.random_seed < 2**32, "random_seed", "in [0, 2**32)")
    expect(recipe.router_aux_loss_coef >= 0, "router_aux_loss_coef", "at least 0")
    expect(recipe.dtype in (None, *SAFETENSORS_NAMES), "dtype", f"one of {', '.join(SAFETENSORS_NAMES)}")
    expect(bool(_parse_size(recipe.max_shard_size)), "max_shard_size", "a size such as 5GB, 500MB or 5GiB")
    experts = sources * recipe.num_chunks if recipe.expert_mode == "split" else sources
    expect(
        1 <= recipe.num_experts_per_tok <= max(1, experts),
        "num_experts_per_tok",
        f"in [1, {experts}], for there are {experts} experts",
        "Give --num-experts-per-tok.",
    )
    names = (SEED, *recipe.experts)
    expect(recipe.tokenizer_source in names, "tokenizer_source", f"one of {', '.join(names)}")
    weights = [spec.weight for spec in recipe.experts.values()] + [recipe.seed_weight] * recipe.seed_expert
    if weights and not sum(weights) > 0:
        problems.append(Problem("recipe", "weight", "all are 0", "at least one above 0"))
    elif recipe.combine in ("mean", "seed") and set(weights) - {1.0}:
        remedy = "Say combine: weighted (or ties, dare_ties, dare_linear), or leave the weights out."
        problems.append(Problem("recipe", "weight", f"weights, which combine: {recipe.combine} ignores", "", remedy))
    return problems

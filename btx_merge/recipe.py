"""What to merge and how: one frozen recipe, from Python, from a YAML file or from the command's flags.

Its values are validated here, all together; whether the sources fit each other is for `checks`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from btx_merge.dtypes import SAFETENSORS_NAMES
from btx_merge.errors import InputError, Problem
from btx_merge.hub import locate
from btx_merge.texts import DomainText, domain_texts_of

REGMEAN_METHODS = ("regmean", "regmean_merged")
"""Ways to combine that are fitted on text."""
COMBINE_METHODS = ("mean", "weighted", "seed", "ties", "dare_ties", "dare_linear", *REGMEAN_METHODS)
EXPERT_MODES = ("whole", "split", "blend")
ROUTER_FITS = ("ridge", "prompts")
"""Routers that are fitted in closed form."""
ROUTER_INITS = ("random", "zeros", *ROUTER_FITS)
FIT_THROUGH = ("expert", "router")
ROUTER_TYPES = ("top_k", "switch", "soft", "sample_top_1")
SEED = "seed"
RECIPE_FILE = "btx_recipe.yaml"
"""What a merge writes down of itself beside its result: a recipe with everything resolved."""
RECORDS = {"resolved": "", "fits": "fitted", "training": "trained", "edits": "edited", "shared_over": ""}
"""Keys of that file that are no recipe, and what they say was done to the model since."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
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
    """How all that is not a feed-forward block is combined: mean, weighted, seed, ties, dare_ties, dare_linear, or
    fitted on `domain_text`: regmean (on the sources' own inputs), regmean_merged (on the merged model's)."""
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
    """random: normal with `router_std`; zeros: every expert equally likely; ridge: fitted on `domain_text`; prompts:
    from `prompts`."""
    router_std: float | None = None
    """Standard deviation of random routers; the seed's initializer_range where not given."""
    random_seed: int = 0
    """Seed of the random routers and of DARE's dropping."""
    domain_text: Mapping[str, DomainText] = field(default_factory=dict)
    """Expert to text of its domain, for what is fitted: one reference, several, or `text:` and `weight:`."""
    domain_tokens: int = 200_000
    """Tokens of each domain that are read, from the beginning of its text. At least 64."""
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Expert to a few lines that are typical of it, for router_init: prompts."""
    router_ridge: float = 0.001
    """ridge: penalty, relative to the mean square of the router's input."""
    regmean_ridge: float = 0.01
    """regmean, regmean_merged: penalty on the distance from the mean, relative to the mean square of the input."""
    fit_through: str = "expert"
    """What tokens pass through while the next layer is fitted: expert (their own domain's) or router (the fitted)."""
    router_type: str = "top_k"
    """How the router chooses: top_k, switch, soft or sample_top_1; see `BTXConfig`. It can be changed later."""
    router_pre_softmax: bool = False
    """top_k: softmax before the selection, scaled so that identical experts give their dense layer; for split."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to (K) by top_k."""
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
        problems: list[Problem] = []
        specs = {}
        object.__setattr__(self, "seed", _as_text(self.seed))
        if not isinstance(self.experts, Mapping):
            found = f"a {type(self.experts).__name__}"
            problems.append(Problem("recipe", "experts", found, "`name: model`, one line per expert"))
        for name, spec in self.experts.items() if not problems else ():
            try:
                specs[name] = as_spec(name, spec)
            except InputError as error:
                problems += error.problems
        object.__setattr__(self, "experts", specs)
        for key, parse in (("domain_text", _as_texts), ("prompts", _as_prompts)):
            try:
                object.__setattr__(self, key, parse(getattr(self, key)))
            except InputError as error:
                problems += error.problems
        problems += _value_problems(self, complete=not problems)
        if problems:
            raise InputError(problems)

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        size = parse_size(self.max_shard_size)
        assert size is not None
        return size

    @property
    def fits_shared(self) -> bool:
        """Whether shared weights are fitted on text."""
        return self.combine in REGMEAN_METHODS

    @property
    def is_fitted(self) -> bool:
        """Whether anything is fitted in closed form when the merge is written."""
        return self.fits_shared or self.router_init in ROUTER_FITS

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "recipe") -> MergeRecipe:
        """A recipe from plain values.

        Raises:
            InputError: an unknown key, a missing seed, or a value that cannot be meant.
        """
        known = [item.name for item in fields(cls)]
        problems = [_unknown(origin, str(key), known) for key in values if key not in known]
        try:
            recipe = cls(**{"seed": "", **{key: value for key, value in values.items() if key in known}})
        except InputError as error:
            problems += [replace(problem, source=origin) for problem in error.problems]
        if problems:
            raise InputError(problems)
        return recipe

    @classmethod
    def from_yaml(cls, file: str | Path, **overrides: Any) -> MergeRecipe:
        """A recipe from a YAML file; `overrides` win over the file. Relative folders are the file's."""
        return cls.from_dict({**read_recipe_file(file), **overrides}, str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` takes back."""
        texts = {
            name: {"text": list(text.references), "weight": text.weight} for name, text in self.domain_text.items()
        }
        prompts = {name: list(lines) for name, lines in self.prompts.items()}
        return {**asdict(self), "domain_text": texts, "prompts": prompts}


class _NoDuplicates(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys: an expert would vanish without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                twice = f"the key {key} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe_file(file: str | Path, on_note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The values of a recipe file, with the folders that it names relative to itself made absolute.

    A merged model's folder or Hub id stands for its own `btx_recipe.yaml`. That names folders and texts without their
    paths; they are looked for beside the model too.

    Args:
        on_note: called with what has become of the model since it was merged, which its recipe does not repeat.

    Raises:
        InputError: the file is missing, is no YAML or no mapping, or the Hub refuses.
    """
    path = Path(file)
    if _HUB_ID.fullmatch(str(file)) and not path.exists() and path.suffix not in (".yaml", ".yml"):
        path = locate("recipe", str(file), weights=False).folder / RECIPE_FILE
    path = path / RECIPE_FILE if (path / RECIPE_FILE).is_file() else path
    roots = [path.parent, *([path.parent.parent] if path.name == RECIPE_FILE else [])]
    values = read_yaml(path, "recipe", "at least `seed:` and `experts:`")
    recorded = {key: values.pop(key, None) for key in RECORDS}
    since = [done for key, done in RECORDS.items() if done and recorded[key]]
    if since and on_note:
        on_note(f"{path}: the model was {' and '.join(since)} since it was merged; its recipe gives the merge alone.")

    values = anchor_sources(values, roots)
    if "domain_text" in values:
        texts = domain_texts_of(str(file), values["domain_text"], roots, "domain_text")
        values["domain_text"] = {text.name: text for text in texts}
    return values


def anchor_sources(values: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """A recipe's values with the folders of its sources made absolute, seen from the first root where one is."""

    def anchored(reference: Any) -> Any:
        if not isinstance(reference, str):
            return reference
        beside = next((root / reference for root in roots if (root / reference).is_dir()), None)
        if beside is None and (reference.startswith(("./", "../")) or reference in (".", "..")):
            beside = roots[0] / reference
        return str(beside.resolve()) if beside else reference

    out = {**values, "seed": anchored(values.get("seed"))}
    if isinstance(experts := values.get("experts"), dict):
        out["experts"] = {
            name: {key: anchored(value) if key in ("model", "base") else value for key, value in spec.items()}
            if isinstance(spec, dict)
            else anchored(spec)
            for name, spec in experts.items()
        }
    return out


def read_yaml(file: Path, source: str, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file, in which no key stands twice.

    Raises:
        InputError: the file is missing, is no YAML or no mapping.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _NoDuplicates)
    except OSError as error:
        raise InputError([Problem(source, str(file), error.strerror or str(error))]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError([Problem(source, str(file), f"unreadable: {reason}")]) from error
    if not isinstance(values, dict):
        raise InputError([Problem(source, str(file), "no keys", expected)])
    return values


def _as_texts(values: Any) -> dict[str, DomainText]:
    if isinstance(values, Mapping) and all(isinstance(text, DomainText) for text in values.values()):
        return dict(values)
    plain = (
        {name: [str(value)] if isinstance(value, Path) else value for name, value in values.items()}
        if isinstance(values, Mapping)
        else values
    )
    return {text.name: text for text in domain_texts_of("recipe", plain, [Path()], "domain_text")}


def _as_prompts(values: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(values, Mapping):
        raise InputError([Problem("recipe", "prompts", f"{values!r}", "`name: [line, line]`, one entry per expert")])
    problems, prompts = [], {}
    for name, given in values.items():
        lines = (given,) if isinstance(given, str) else given
        if isinstance(lines, (list, tuple)) and lines and all(isinstance(x, str) and x.strip() for x in lines):
            prompts[str(name)] = tuple(lines)
        else:
            problems.append(Problem("recipe", f"prompts.{name}", f"{given!r}", "lines of text"))
    if problems:
        raise InputError(problems)
    return prompts


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def as_spec(name: Any, spec: Any, key: str = "experts") -> ExpertSpec:
    """An expert of a recipe from plain values: a model, or a mapping with `model:`.

    Args:
        key: the mapping that it stands in, as errors name it.

    Raises:
        InputError: a name or a value that cannot be meant.
    """
    where = f"{key}.{name}"
    if isinstance(spec, (str, Path)):
        spec = {"model": str(spec)}
    if isinstance(spec, ExpertSpec):
        spec = asdict(spec)
    if not isinstance(spec, Mapping):
        raise InputError([Problem("recipe", where, f"{spec!r}", "a model, or `model:` and `weight:`")])
    known = [item.name for item in fields(ExpertSpec)]
    problems = [_unknown("recipe", f"{where}.{key}", known) for key in spec if key not in known]
    values = {"weight": 1.0, "base": None, **{key: _as_text(value) for key, value in spec.items()}}
    if not values.get("model"):
        problems.append(Problem("recipe", where, "no model", "`model: folder or org/name`"))
    elif not isinstance(values["model"], str):
        problems.append(Problem("recipe", f"{where}.model", f"{values['model']!r}", "a folder or org/name"))
    if not _is_number(values["weight"]) or not 0 <= values["weight"] < math.inf:
        problems.append(Problem("recipe", f"{where}.weight", f"{values['weight']!r}", "a number, at least 0"))
    if values["base"] is not None and not (values["base"] and isinstance(values["base"], str)):
        problems.append(Problem("recipe", f"{where}.base", f"{values['base']!r}", "a folder or org/name"))
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == SEED:
        expected = "letters, digits, `_`, `-`, `.`; not `seed`, which is the seed's own"
        problems.append(Problem("recipe", key, f"the name {name!r}", expected))
    if problems:
        raise InputError(problems)
    return ExpertSpec(**values)


def _unknown(origin: str, key: str, known: list[str]) -> Problem:
    near = difflib.get_close_matches(key.split(".")[-1].replace("-", "_"), known, 1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}."
    return Problem(origin, key, "unknown key", "", remedy)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation to what a person calls it
    "str": ("text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", _is_number),
}
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what is expected, and whether a value is that
    "seed": ("the model that all experts grew from", bool),
    "seed_weight": ("a number, at least 0", lambda value: 0 <= value < math.inf),
    "combine": (f"one of {', '.join(COMBINE_METHODS)}", lambda value: value in COMBINE_METHODS),
    "density": ("in (0, 1]", lambda value: 0 < value <= 1),
    "scale": ("a finite number", math.isfinite),
    "expert_mode": (f"one of {', '.join(EXPERT_MODES)}", lambda value: value in EXPERT_MODES),
    "num_chunks": ("at least 1", lambda value: value >= 1),
    "router_init": (f"one of {', '.join(ROUTER_INITS)}", lambda value: value in ROUTER_INITS),
    "router_std": ("above 0", lambda value: 0 < value < math.inf),
    "domain_tokens": ("at least 64", lambda value: value >= 64),
    "router_ridge": ("above 0", lambda value: 0 < value < math.inf),
    "regmean_ridge": ("above 0", lambda value: 0 < value < math.inf),
    "fit_through": (f"one of {', '.join(FIT_THROUGH)}", lambda value: value in FIT_THROUGH),
    "random_seed": ("in [0, 2**32)", lambda value: 0 <= value < 2**32),
    "router_type": (f"one of {', '.join(ROUTER_TYPES)}", lambda value: value in ROUTER_TYPES),
    "num_experts_per_tok": ("at least 1", lambda value: value >= 1),
    "router_aux_loss_coef": ("at least 0", lambda value: 0 <= value < math.inf),
    "dtype": (f"one of {', '.join(SAFETENSORS_NAMES)}", lambda value: value in SAFETENSORS_NAMES),
    "max_shard_size": ("a size such as 5GB, 500MB or 5GiB", lambda value: bool(parse_size(value))),
}


def _exponent_remedy(value: Any) -> str:
    try:
        float(value)
    except (TypeError, ValueError):
        return ""
    return "In YAML a number stands without quotes, and with a point before an exponent: 1.0e-5."


def parse_size(text: str) -> int | None:
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    base = 1024 if "i" in text.lower() else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _value_problems(recipe: MergeRecipe, complete: bool) -> list[Problem]:
    """What is wrong with single values; then, if nothing is, what does not go together."""
    problems = []

    def problem(key: str, found: str, expected: str, remedy: str = "") -> None:
        problems.append(Problem("recipe", key, found, expected, remedy))

    for item in fields(recipe):
        value, annotation = getattr(recipe, item.name), str(item.type)
        kind, is_kind = _KINDS.get(annotation.removesuffix(" | None"), ("", None))
        if is_kind is None or (value is None and annotation.endswith(" | None")):
            continue
        expected, is_fine = _VALUES.get(item.name, (kind, lambda value: True))
        if value is None and item.name == "seed":
            problem("seed", "missing", expected)
        elif not is_kind(value):
            problem(item.name, f"{value!r}", expected if kind == "text" else kind, _exponent_remedy(value))
        elif not is_fine(value):
            problem(item.name, f"{value!r}" if value != "" else "missing", expected)
    if problems or not complete:
        return problems

    sources = len(recipe.experts) + recipe.seed_expert
    experts = sources * recipe.num_chunks if recipe.expert_mode == "split" else sources
    if not sources:
        problem("experts", "none", "at least one", "Give --expert NAME=MODEL.")
    elif recipe.num_experts_per_tok > experts:
        expected = f"in [1, {experts}], for there are {experts} experts" if experts > 1 else "1, for there is 1 expert"
        problem("num_experts_per_tok", f"{recipe.num_experts_per_tok}", expected, "Give --num-experts-per-tok.")
    names = (SEED, *recipe.experts)
    if recipe.tokenizer_source not in names:
        problem("tokenizer_source", f"{recipe.tokenizer_source!r}", f"one of {', '.join(names)}")
    weights = [spec.weight for spec in recipe.experts.values()] + [recipe.seed_weight] * recipe.seed_expert
    if sources and not sum(weights) > 0:
        problem("weight", "all are 0", "at least one above 0")
    elif recipe.combine in ("mean", "seed", *REGMEAN_METHODS) and set(weights) - {1.0}:
        remedy = "Say combine: weighted (or ties, dare_ties, dare_linear), or leave the weights out."
        problem("weight", f"weights, which combine: {recipe.combine} ignores", "", remedy)
    return problems + _fit_problems(recipe)


def _fit_problems(recipe: MergeRecipe) -> list[Problem]:
    """Whether what is fitted has its text, and no text is given in vain."""
    problems = []
    needs_text = recipe.fits_shared or recipe.router_init == "ridge"
    needs_prompts = recipe.router_init == "prompts"
    known = (*((SEED,) if recipe.seed_expert else ()), *recipe.experts)
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
            remedy = "Say router_init: ridge or combine: regmean_merged, or leave it out."
            remedy = "Say router_init: prompts, or leave them out." if key == "prompts" else remedy
            problems.append(Problem("recipe", key, "given, but nothing is fitted on it", "", remedy))
    if recipe.is_fitted and recipe.expert_mode == "blend":
        remedy = "Choose whole or split, or fit nothing."
        problems.append(Problem("recipe", "expert_mode", "blend", "experts that belong to a domain", remedy))
    return problems

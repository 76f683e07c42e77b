"""A merged model with other experts, laid out before a byte is written.

What stays of the model takes part as dense sources over its own files (`MergedModel.dense_tensors`), so experts that
stay are copied and new ones come from where a merge takes them. Ids of its tokens never change; tokens that a new
expert brings come behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.architectures.btx import ROUTER, SELECTION_BIAS
from btx_merge.architectures.llama import EMBEDDING
from btx_merge.checkpoints.dtypes import TORCH_NAMES, Float32, from_float32
from btx_merge.checkpoints.layout import Job, OutputTensor, lay_out
from btx_merge.editing.checks import set_problems, text_problems
from btx_merge.editing.recipe import EditRecipe
from btx_merge.errors import InputError, Problem
from btx_merge.merging.checks import Examined, examine_sources
from btx_merge.merging.files import public_source
from btx_merge.merging.plan import Plan, make_plan
from btx_merge.merging.recipe import REGMEAN_METHODS, MergeRecipe
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import RECIPE_FILE, anchor_sources, read_record
from btx_merge.reporting import short
from btx_merge.sources.opening import open_each
from btx_merge.sources.source import SEED, ExpertSpec, Source
from btx_merge.texts.references import public_reference
from btx_merge.values import is_number

_HERE = "(the model)"


@dataclass(frozen=True, eq=False)
class EditPlan:
    """What becomes of a merged model."""

    recipe: EditRecipe
    model: MergedModel
    plan: Plan
    """Of the result; sources that stay lie in the model's own files."""
    examined: Examined
    origins: Mapping[str, str | None]
    """Every domain of the result, in order, and its name in the model; None for what is new or replaced."""
    values: Mapping[str, Any]
    """The model's recipe as it lies; empty where it has none."""

    @property
    def new(self) -> list[str]:
        """Domains whose experts come from a new source."""
        return [name for name, origin in self.origins.items() if origin is None]

    @cached_property
    def router_inits(self) -> dict[str, str]:
        """How the router's row of every new expert comes about: ridge, random, zeros or kept."""
        texts = {text.name for text in self.recipe.domain_text}
        kept = {name: "kept" if name in self.recipe.replace else "random" for name in self.new}
        return {name: self.recipe.router_init or ("ridge" if name in texts else kept[name]) for name in self.new}

    @cached_property
    def row_origins(self) -> list[int | None]:
        """For every expert of the result, the model's expert whose router row it has."""
        rows: list[int | None] = []
        for name, origin in self.origins.items():
            if self.router_inits.get(name) == "kept":
                origin = name
            rows += self.model.experts_of(origin) if origin else [None] * self.plan.chunks
        return rows

    @property
    def fitted_rows(self) -> list[int]:
        """The numbers of the experts whose rows are fitted."""
        names = {name for name, init in self.router_inits.items() if init == "ridge"}
        chunks = self.plan.chunks
        return [i * chunks + chunk for i, name in enumerate(self.origins) if name in names for chunk in range(chunks)]

    def is_kept(self, source: Source) -> bool:
        """Whether a source of the plan lies in the model itself."""
        return source.located is self.model.located

    def is_of_router(self, tensor: OutputTensor) -> bool:
        """Whether a tensor has a row for each expert: a router, or the bias that ranks experts."""
        return tensor.name.endswith((ROUTER.partition("}")[2], SELECTION_BIAS.partition("}")[2]))

    def router_rows(self, job: Job) -> Any:
        """A router's rows, [E, H]: those that stay as they are, new ones random or zero (fitted ones zero so far)."""
        stored = self.model.tensors[job.tensor.name]
        rows = stored.read_rows(0, stored.shape[0]).reshape(stored.shape[0], -1).copy()
        layer = int(job.tensor.name.split(".")[2])
        return np.concatenate(
            [
                rows[origin] if origin is not None else self._new_row(number, layer, job)
                for number, origin in enumerate(self.row_origins)
            ]
        )

    def _new_row(self, number: int, layer: int, job: Job) -> Any:
        name = self.plan.expert_names[number]
        domain = list(self.origins)[number // self.plan.chunks]
        values: Float32 = np.zeros(job.tensor.shape[1:], np.float32)
        if self.router_inits[domain] == "random" and len(job.tensor.shape) > 1:
            std = self.recipe.router_std or self.plan.seed.config["initializer_range"]
            key = [self.recipe.random_seed, layer, *name.encode()]  # the same row whatever else is added
            values = (std * np.random.RandomState(key).standard_normal(values.shape)).astype(np.float32)
        return from_float32(values, job.tensor.dtype)

    def new_values(self, *, public: bool) -> dict[str, Any]:
        """The recipe of a merge of the new set; with references as they may be published, or as they were given."""
        experts = self.values.get("experts") or {}
        by_name = {source.name: source for source in self.plan.sources}
        changed: dict[str, Any] = {}
        for name, origin in self.origins.items():
            if origin is None:
                spec = {**self.recipe.replace, **self.recipe.add}[name]
                changed[name] = _public_spec(spec, by_name[name]) if public else _given_spec(spec)
            elif origin in experts:
                changed[name] = experts[origin]
        values = {key: value for key, value in self.values.items() if key not in ("resolved", "shared_over")}
        values |= {"experts": changed, "seed_expert": SEED in self.origins}
        values["num_experts_per_tok"] = self.plan.recipe.num_experts_per_tok
        for key in ("domain_text", "prompts"):
            before = values.get(key) or {}
            values[key] = {
                name: before[origin] for name, origin in self.origins.items() if origin and origin in before
            }
        if values.get("router_init") == "ridge" or values.get("combine") in REGMEAN_METHODS:
            values["domain_text"] |= {
                text.name: {"text": [*map(public_reference, text.references)], "weight": text.weight}
                for text in self.recipe.domain_text
                if text.name in self.new
            }
        if values.get("tokenizer_source", SEED) not in self.origins:
            values["tokenizer_source"] = SEED
        return values

    @property
    def shared_over(self) -> dict[str, Any]:
        """The sources whose merge the model's shared weights are, as keys of a recipe."""
        keys = ("seed", "seed_expert", "seed_weight", "experts")
        return self.values.get("shared_over") or {key: self.values[key] for key in keys if key in self.values}


def _public_spec(spec: ExpertSpec, source: Source) -> dict[str, Any]:
    base = source.base.public_name if spec.base is not None and source.base else None
    return {"model": public_source(source), "weight": spec.weight, "base": base}


def _given_spec(spec: ExpertSpec) -> dict[str, Any]:
    """With folders seen from here, wherever else the model's own sources are looked for."""
    values = asdict(spec)
    return values | {
        key: str(Path(values[key]).resolve())
        for key in ("model", "base")
        if values[key] is not None and Path(values[key]).is_dir()
    }


def plan_edit(recipe: EditRecipe, model: MergedModel, scratch: Callable[[], Path]) -> EditPlan:
    """Opens and checks what is new against the model, and lays out the result.

    Raises:
        InputError: every reason to refuse this edit.
    """
    values = read_record(model.located.folder)
    opened, problems = _open_new(recipe, model, values, scratch)
    if named := set_problems(recipe, model, values):
        raise InputError([*named, *problems])
    origins = _origins(recipe, model)
    problems += text_problems(recipe, model, origins)
    sources = _sources(model, values, origins, opened)
    merge_recipe = _merge_recipe(recipe, model, values, origins, problems)
    if merge_recipe is None:
        raise InputError(problems)
    try:
        examined = examine_sources(merge_recipe, sources, problems)
    except InputError as error:
        raise InputError([_without_untie(problem) for problem in error.problems]) from error
    plan = make_plan(merge_recipe, examined.sources, examined.vocabulary)
    relaid = _relaid(plan, model)
    return EditPlan(recipe, model, relaid, examined, origins, values)


def _origins(recipe: EditRecipe, model: MergedModel) -> dict[str, str | None]:
    stays = [name for name in model.domains if name not in recipe.drop]
    origins: dict[str, str | None] = {
        recipe.rename.get(name, name): None if name in recipe.replace else name for name in stays
    }
    return {**origins, **dict.fromkeys(recipe.add)}


def _open_new(
    recipe: EditRecipe,
    model: MergedModel,
    values: Mapping[str, Any],
    scratch: Callable[[], Path],
) -> tuple[dict[str, Source], list[Problem]]:
    """What is new, opened; and why some could not be. An adapter may be one on the seed, which is looked for."""
    specs, seed = {**recipe.replace, **recipe.add}, None
    folder = model.located.folder.resolve()
    reference = recipe.sources.get(SEED) or anchor_sources(values, [folder, folder.parent]).get("seed")
    if specs and isinstance(reference, str):  # where it cannot be had, an adapter names its base itself or is refused
        seed = open_each({SEED: ExpertSpec(reference)}, None, scratch)[0].get(SEED)
    return open_each(specs, seed, scratch)


def _recorded_weight(values: Mapping[str, Any], key: str, where: str) -> float:
    """Return a weight that the model's recipe gives, 1 by default.

    Raises:
        InputError: it is no number of at least 0.
    """
    weight = values.get(key, 1.0)
    if not is_number(weight) or not 0 <= weight < float("inf"):
        raise InputError([Problem("model", f"{RECIPE_FILE}: {where}", short(weight), "a number of at least 0")])
    return float(weight)


def _sources(
    model: MergedModel, values: Mapping[str, Any], origins: Mapping[str, str | None], opened: Mapping[str, Source]
) -> list[Source]:
    """The seed, then the others in their order; those that stay as dense models over the model's own files."""
    specs = values.get("experts") or {}

    def of_model(name: str, origin: str) -> Source:
        spec = specs.get(origin)
        weight = _recorded_weight(spec, "weight", f"experts.{origin}.weight") if isinstance(spec, dict) else 1.0
        if origin == SEED:
            weight = _recorded_weight(values, "seed_weight", "seed_weight")
        tensors = model.dense_tensors(origin)
        config = {**model.dense_config, "vocab_size": tensors[EMBEDDING].shape[0]}
        return Source(name, model.located, config, model.config, tensors, weight=weight)

    sources = [] if SEED in origins else [of_model(SEED, model.domains[0])]  # whose experts are not used
    for name, origin in origins.items():
        if origin is not None:
            sources.append(of_model(name, origin))
        elif name in opened:
            sources.append(opened[name])
    return sources


def _merge_recipe(
    recipe: EditRecipe,
    model: MergedModel,
    values: Mapping[str, Any],
    origins: Mapping[str, str | None],
    problems: list[Problem],
) -> MergeRecipe | None:
    """The recipe by which the result is laid out; what is wrong with it is added to the problems."""
    chunks = model.config.get("num_chunks", 1)
    try:
        return MergeRecipe(
            _HERE,
            dict.fromkeys((name for name in origins if name != SEED), ExpertSpec(_HERE)),
            seed_expert=SEED in origins,
            expert_mode="split" if chunks > 1 else "whole",
            num_chunks=chunks,
            fold_norms=bool(values.get("fold_norms", False)),
            combine="ties" if values.get("combine") == "ties" else "mean",  # which trims over whole tensors
            router_init="zeros",
            router_type=model.config.get("router_type", "top_k"),
            num_experts_per_tok=recipe.num_experts_per_tok or model.experts_per_token,
            dtype=TORCH_NAMES[model.dtype],
            max_shard_size=values.get("max_shard_size", "5GB"),
            untie=not model.dense_config["tie_word_embeddings"],
            allow_nonfinite=recipe.allow_nonfinite or bool(values.get("allow_nonfinite", False)),
            allow_unrelated=recipe.allow_unrelated or bool(values.get("allow_unrelated", False)),
        )
    except InputError as error:
        problems += [replace(problem, source="model") for problem in error.problems]
        return None


def _without_untie(problem: Problem) -> Problem:
    if "tie_word_embeddings" not in problem.where or "--untie" not in problem.remedy:
        return problem
    return replace(problem, remedy="Give a model that ties them, or merge anew with --untie.")


def _relaid(plan: Plan, model: MergedModel) -> Plan:
    """The plan's tensors, each in the dtype that the model has it in, and the biases that rank experts."""

    def wanted() -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for tensor in plan.tensors:
            stored = model.tensors.get(tensor.name)
            yield tensor.name, stored.dtype if stored else plan.dtype, tensor.shape
            bias = tensor.name.replace(".mlp.gate.weight", ".mlp.routing.e_score_correction_bias")
            if bias != tensor.name and bias in model.tensors:
                yield bias, model.tensors[bias].dtype, (plan.num_experts,)

    tensors, shards = lay_out(wanted(), plan.recipe.shard_bytes)
    return replace(plan, tensors=tensors, shards=shards)

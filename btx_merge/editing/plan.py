"""A merged model with other experts, laid out before a byte is written.

What stays of the model takes part as dense sources over its own files (`MergedModel.dense_tensors`), so experts that
stay are copied and new ones come from where a merge takes them. Ids of its tokens never change; tokens that a new
expert brings come behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.architectures.btx import ROUTER, SELECTION_BIAS
from btx_merge.architectures.llama import EMBEDDING
from btx_merge.checkpoints.dtypes import Float32
from btx_merge.checkpoints.layout import Job, OutputTensor, Shape, lay_out
from btx_merge.editing.checks import set_problems, text_problems
from btx_merge.editing.recipe import EditRecipe
from btx_merge.errors import InputError, Problem
from btx_merge.fitting.recipe import TEXT_ROUTERS
from btx_merge.merging.checks import Examined, examine_sources
from btx_merge.merging.combine import cast
from btx_merge.merging.mixture import Mixture
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import anchor_sources, read_record
from btx_merge.sources.opening import open_each
from btx_merge.sources.source import SEED, ExpertSpec, Source
from btx_merge.sources.text_checks import shared_text_warnings
from btx_merge.values import parse_size


@dataclass(frozen=True, eq=False)
class EditPlan:
    """What becomes of a merged model."""

    recipe: EditRecipe
    """What was asked for."""
    model: MergedModel
    """The model as it is, which stays."""
    mixture: Mixture
    """The result; sources that stay lie in the model's own files."""
    warnings: tuple[Problem, ...]
    """What deserves a look in the new sources and in the texts."""
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
        """How the router's row of every new expert comes about: logistic, ridge, random, zeros or kept."""
        texts = {text.name for text in self.recipe.domain_text}
        inits = {}
        for name in self.new:
            if self.recipe.router_init:
                inits[name] = self.recipe.router_init
            elif name in texts:
                inits[name] = "logistic" if texts.difference(self.new) else "ridge"
            else:
                inits[name] = "kept" if name in self.recipe.replace else "random"
        return inits

    @cached_property
    def row_origins(self) -> list[int | None]:
        """For every expert of the result, the model's expert whose router row it has; None for a new row.

        Of a model with the experts a, b and c, from which b is dropped and to which d is added: [0, 2, None].
        """
        rows: list[int | None] = []
        for name, origin in self.origins.items():
            if self.router_inits.get(name) == "kept":
                origin = name  # replaced under its own name: the row of its predecessor
            rows += self.model.experts_of(origin) if origin else [None] * self.mixture.chunks
        return rows

    @property
    def row_fit(self) -> str | None:
        """How rows are fitted, all in one way; None where none is."""
        return next((init for init in self.router_inits.values() if init in TEXT_ROUTERS), None)

    @property
    def fitted_rows(self) -> list[int]:
        """The numbers of the experts whose rows are fitted."""
        names = {name for name, init in self.router_inits.items() if init in TEXT_ROUTERS}
        chunks = self.mixture.chunks
        return [i * chunks + chunk for i, name in enumerate(self.origins) if name in names for chunk in range(chunks)]

    def is_kept(self, source: Source) -> bool:
        """Tell whether a source lies in the model itself."""
        return source.located is self.model.located

    def is_of_router(self, tensor: OutputTensor) -> bool:
        """Tell whether a tensor has a row for each expert: a router, or the bias that ranks experts."""
        return tensor.name.endswith((ROUTER.partition("}")[2], SELECTION_BIAS.partition("}")[2]))

    def router_rows(self, job: Job) -> Any:
        """Return the bytes of a router, [E, H], or of a bias that ranks experts, [E].

        Rows of experts that stay are as they were; new ones are random or zero. Rows that are fitted later are zero.
        """
        stored = self.model.tensors[job.tensor.name]
        rows = stored.read_rows(0, stored.shape[0]).reshape(stored.shape[0], -1).copy()  # bytes, by expert
        layer = int(job.tensor.name.split(".")[2])
        out = []
        for number, origin in enumerate(self.row_origins):
            out.append(self._new_row(number, layer, job) if origin is None else rows[origin])
        return np.concatenate(out)

    def _new_row(self, number: int, layer: int, job: Job) -> Any:
        """Return the bytes of a new expert's row, by the expert's number in the result."""
        name = self.mixture.expert_names[number]
        domain = list(self.origins)[number // self.mixture.chunks]
        values: Float32 = np.zeros(job.tensor.shape[1:], np.float32)
        if self.router_inits[domain] == "random" and len(job.tensor.shape) > 1:
            std = self.recipe.router_std or self.mixture.seed.config["initializer_range"]
            key = [self.recipe.random_seed, layer, *name.encode()]  # the same row whatever else is added
            with np.errstate(over="ignore"):  # an overflow becomes Inf, which `cast` reports
                values = (std * np.random.RandomState(key).standard_normal(values.shape)).astype(np.float32)
        return cast(values, job, self.mixture)


def plan_edit(recipe: EditRecipe, model: MergedModel, scratch: Callable[[], Path]) -> EditPlan:
    """Open what is new, check it against the model, and lay out the result.

    Raises:
        InputError: every reason to refuse this edit.
    """
    values = read_record(model.located.folder)
    opened, problems = _open_new(recipe, model, values, scratch)
    if named := set_problems(recipe, model, values):
        raise InputError([*named, *problems])
    origins = _origins(recipe, model)
    sources = _sources(model, values, origins, opened)
    problems += text_problems(recipe, model, origins)
    allow_unrelated = recipe.allow_unrelated or bool(values.get("allow_unrelated"))
    untie = not model.dense_config["tie_word_embeddings"]
    try:
        examined = examine_sources(sources, problems, untie=untie, allow_unrelated=allow_unrelated)
    except InputError as error:
        raise InputError(map(_without_untie, error.problems)) from error
    new = {name for name, origin in origins.items() if origin is None}
    warnings = [warning for warning in examined.warnings if warning.source in new]
    warnings += shared_text_warnings(recipe.domain_text)
    return EditPlan(recipe, model, _mixture(recipe, model, values, examined), tuple(warnings), origins, values)


def _origins(recipe: EditRecipe, model: MergedModel) -> dict[str, str | None]:
    """Return every domain of the result, in order, and its name in the model; None for what is new or replaced."""
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
    """Open what is new, or say why not. An adapter may be one on the seed, which is looked for."""
    specs, seed = {**recipe.replace, **recipe.add}, None
    folder = model.located.folder.resolve()
    reference = recipe.sources.get(SEED) or anchor_sources(values, [folder, folder.parent]).get("seed")
    if specs and isinstance(reference, str):  # where it cannot be had, an adapter names its base itself or is refused
        seed = open_each({SEED: ExpertSpec(reference)}, None, scratch)[0].get(SEED)
    return open_each(specs, seed, scratch)


def _sources(
    model: MergedModel, values: Mapping[str, Any], origins: Mapping[str, str | None], opened: Mapping[str, Source]
) -> list[Source]:
    """Return the seed, then the others in their order; those that stay as dense models over the model's own files."""
    specs = {SEED: {"weight": values.get("seed_weight")}, **(values.get("experts") or {})}

    def of_model(name: str, origin: str) -> Source:
        """Return the model with the feed-forward blocks of one domain as a source."""
        spec = specs.get(origin)
        weight = spec.get("weight") if isinstance(spec, dict) else None
        tensors = model.dense_tensors(origin)
        config = {**model.dense_config, "vocab_size": tensors[EMBEDDING].shape[0]}
        return Source(name, model.located, config, model.config, tensors, weight=1.0 if weight is None else weight)

    sources = [] if SEED in origins else [of_model(SEED, model.domains[0])]  # no expert, but what others are held to
    for name, origin in origins.items():
        if origin is not None:
            sources.append(of_model(name, origin))
        elif name in opened:
            sources.append(opened[name])
    return sources


def _without_untie(problem: Problem) -> Problem:
    """Return a problem without the advice to untie, which a merge can follow and an edit cannot."""
    if "tie_word_embeddings" not in problem.where or "--untie" not in problem.remedy:
        return problem
    return replace(problem, remedy="Give a model that ties them, or merge anew with --untie.")


def _mixture(recipe: EditRecipe, model: MergedModel, values: Mapping[str, Any], examined: Examined) -> Mixture:
    """Lay out the result: each tensor in the dtype that the model has it in, in files as large as the model's."""
    seed, *others = examined.sources
    is_expert = SEED in model.domains and SEED not in recipe.drop
    sketch = Mixture(
        tensors=(),
        shards=(),
        seed=seed,
        experts=(seed, *others) if is_expert else tuple(others),
        vocabulary=examined.vocabulary,
        dtype=model.dtype,
        expert_mode="split" if model.num_chunks > 1 else "whole",
        chunks=model.num_chunks,
        router_type=model.router_type,
        num_experts_per_tok=recipe.num_experts_per_tok or model.num_experts_per_tok,
        fold_norms=bool(values.get("fold_norms")),
        has_whole_jobs=values.get("combine") == "ties",
        allow_nonfinite=recipe.allow_nonfinite or bool(values.get("allow_nonfinite")),
        has_own_head=not model.dense_config["tie_word_embeddings"],
    )
    tensors, shards = lay_out(_tensors(sketch, model), parse_size(values.get("max_shard_size") or "5GB") or 0)
    return replace(sketch, tensors=tensors, shards=shards)


def _tensors(mixture: Mixture, model: MergedModel) -> Iterator[tuple[str, str, Shape]]:
    """Yield name, dtype and shape of every tensor of the result, biases that rank experts behind their routers."""
    router, bias = (pattern.partition("}")[2] for pattern in (ROUTER, SELECTION_BIAS))
    for name, shape in mixture.output_shapes():
        stored = model.tensors.get(name)
        yield name, stored.dtype if stored else mixture.dtype, shape
        ranking = name.removesuffix(router) + bias
        if name.endswith(router) and ranking in model.tensors:
            yield ranking, model.tensors[ranking].dtype, (mixture.num_experts,)

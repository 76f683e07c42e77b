"""The options of a recipe, which `btx check` and `btx merge` share: from flags and a file to one recipe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.cli.options import lists, option, pairs
from btx_merge.cli.printing import Lines
from btx_merge.errors import InputError, Problem
from btx_merge.fitting.recipe import FIT_THROUGH
from btx_merge.merging.recipe import COMBINE_METHODS, EXPERT_MODES, HEADS, ROUTER_INITS, ROUTER_TYPES, MergeRecipe
from btx_merge.merging.recipe_file import read_recipe_file
from btx_merge.merging.template import recipe_template
from btx_merge.texts.references import parse_domain_texts


@dataclass(frozen=True)
class GivenRecipe:
    """What the user gave of a recipe, by a file and by flags, not validated yet."""

    values: Mapping[str, Any]
    origin: str
    """The file, or the command, as errors name it."""
    flags: Mapping[str, str]
    """Key of the recipe to the flag that it was given by."""
    problems: tuple[Problem, ...]
    """Flags that do not fit together."""

    def build(self) -> MergeRecipe:
        """Return the recipe.

        Raises:
            InputError: values that cannot be meant, all of them, under the names that the user typed.
        """
        problems = list(self.problems)
        try:
            recipe = MergeRecipe.from_dict(self.values, self.origin)
        except InputError as error:
            problems += [self._as_typed(problem) for problem in error.problems]
        if problems:
            raise InputError(problems)
        return recipe

    def template(self) -> str:
        """Return a recipe file with these values, and the default of every other option.

        Raises:
            InputError: values that were given and cannot be meant. What is missing is left to be filled in.
        """
        try:
            self.build()
        except InputError as error:
            given = {*self.values, *self.flags.values()}
            problems = [
                problem
                for problem in error.problems
                if problem in self.problems or problem.where.split(".")[0] in given
            ]
            if problems:
                raise InputError(problems) from None
        return recipe_template(self.values)

    def _as_typed(self, problem: Problem) -> Problem:
        flag = self.flags.get(problem.where)
        return replace(problem, source="command", where=flag) if flag else problem


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes a `GivenRecipe`, the recipe's options beside its own."""
    own = inspect.signature(command, eval_str=True)
    options = inspect.signature(_recipe_options, eval_str=True)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        recipe = _recipe_options(**{key: values.pop(key) for key in options.parameters})
        command(recipe, **values)

    kept = [parameter for name, parameter in own.parameters.items() if name != "recipe"]
    merged = [p.replace(kind=p.KEYWORD_ONLY) for p in (*options.parameters.values(), *kept)]
    run.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return run


def _recipe_options(
    recipe: Annotated[
        Path | None, option("YAML file, or a merged model (folder, Hub id) for its own; flags win over it.")
    ] = None,
    seed: Annotated[str | None, option("Folder or org/name[@revision] that all experts grew from.")] = None,
    expert: Annotated[
        list[str] | None, option("Again for every expert: a checkpoint or a PEFT adapter.", metavar="NAME=MODEL")
    ] = None,
    weight: Annotated[list[str] | None, option("Share in a weighted combining.", metavar="NAME=NUMBER")] = None,
    base: Annotated[
        list[str] | None, option("What an adapter was trained on, if not the seed.", metavar="NAME=MODEL")
    ] = None,
    seed_expert: Annotated[
        bool | None,
        option("Whether the seed is an expert too [default: yes].", "--seed-expert/--no-seed-expert"),
    ] = None,
    combine: Annotated[
        str | None,
        option(f"{', '.join(COMBINE_METHODS)}: rule for shared weights [default: mean].", choices=COMBINE_METHODS),
    ] = None,
    head: Annotated[
        str | None,
        option("fitted: a head of its own, rows weighed by frequency [default: combined].", choices=HEADS),
    ] = None,
    density: Annotated[float | None, option("ties, dare_*: kept part of a difference [default: 0.8].")] = None,
    scale: Annotated[float | None, option("ties, dare_*: factor on the difference [default: 1].")] = None,
    expert_mode: Annotated[
        str | None, option(f"{', '.join(EXPERT_MODES)} [default: whole].", choices=EXPERT_MODES)
    ] = None,
    num_chunks: Annotated[int | None, option("split: experts per source [default: 2].")] = None,
    fold_norms: Annotated[
        bool | None, option("Experts absorb the ratio of their own norm to the merged one.", "--fold-norms")
    ] = None,
    router_init: Annotated[
        str | None, option(f"{', '.join(ROUTER_INITS)} [default: random].", choices=ROUTER_INITS)
    ] = None,
    router_std: Annotated[
        float | None, option("Deviation of random routers [default: the seed's initializer_range].")
    ] = None,
    random_seed: Annotated[int | None, option("Seed of all randomness [default: 0].")] = None,
    domain_text: Annotated[
        list[str] | None,
        option("Again for every expert: text of its domain, for what is fitted.", metavar="NAME=TEXT[:WEIGHT]"),
    ] = None,
    domain_tokens: Annotated[int | None, option("Tokens read of each domain [default: 200000].")] = None,
    prompt: Annotated[
        list[str] | None, option("Again: a line typical of an expert, for router_init prompts.", metavar="NAME=LINE")
    ] = None,
    router_ridge: Annotated[float | None, option("ridge: relative penalty [default: 0.001].")] = None,
    regmean_ridge: Annotated[
        float | None, option("regmean: relative penalty on the distance from the mean [default: 0.01].")
    ] = None,
    fit_through: Annotated[
        str | None,
        option(
            f"{', '.join(FIT_THROUGH)}: what leads to the next layer to be fitted [default: expert].",
            choices=FIT_THROUGH,
        ),
    ] = None,
    router_type: Annotated[
        str | None, option(f"{', '.join(ROUTER_TYPES)} [default: top_k].", choices=ROUTER_TYPES)
    ] = None,
    router_pre_softmax: Annotated[
        bool | None, option("top_k: softmax before the selection, for split experts.", "--router-pre-softmax")
    ] = None,
    num_experts_per_tok: Annotated[int | None, option("Experts per token [default: 2].")] = None,
    router_aux_loss_coef: Annotated[
        float | None, option("Coefficient of the load balancing loss [default: 0.01].")
    ] = None,
    dtype: Annotated[
        str | None, option("bfloat16, float16 or float32 [default: the seed's].", choices=SAFETENSORS_NAMES)
    ] = None,
    max_shard_size: Annotated[str | None, option("Largest weights file [default: 5GB].")] = None,
    tokenizer_source: Annotated[
        str | None, option("Source of chat template, special tokens, generation config [default: seed].")
    ] = None,
    untie: Annotated[bool | None, option("Mix tied and untied sources; the result is untied.", "--untie")] = None,
    allow_nonfinite: Annotated[
        bool | None, option("Go on where a source holds NaN or Inf.", "--allow-nonfinite")
    ] = None,
    allow_unrelated: Annotated[
        bool | None, option("Go on where a source did not grow from the seed.", "--allow-unrelated")
    ] = None,
) -> GivenRecipe:
    """Return the recipe's values from a file and from flags, which win."""
    return _given({key: value for key, value in locals().items() if value is not None})


def _given(options: dict[str, Any]) -> GivenRecipe:
    """Return what the options that were given say."""
    specs = {key: pairs(f"--{key}", options.pop(key, [])) for key in ("expert", "weight", "base")}
    texts = parse_domain_texts("--domain-text", options.pop("domain_text", []))
    prompts = lists("--prompt", options.pop("prompt", []))
    file = options.pop("recipe", None)
    given = {*specs["expert"], *specs["base"], *({"seed"} & options.keys())}
    values = read_recipe_file(file, Lines(), given.__contains__) if file else {}
    values |= options
    for key, named in (("domain_text", {text.name: text for text in texts}), ("prompts", prompts)):
        if named:
            before = values.get(key)
            values[key] = {**before, **named} if isinstance(before, dict) else named
    flags = {key: f"--{key.replace('_', '-')}" for key in options}
    problems = _add_experts(values, flags, specs)
    return GivenRecipe(values, str(file or "command"), flags, tuple(problems))


def _add_experts(
    values: dict[str, Any], flags: dict[str, str], specs: Mapping[str, Mapping[str, str]]
) -> list[Problem]:
    """Put the experts of `--expert`, `--weight` and `--base` into a recipe's values; return what does not fit.

    Args:
        flags: gets the keys that these flags stand for.
    """
    experts = values.get("experts") or {}
    if not isinstance(experts, dict):
        return []  # the recipe says what is wrong with it
    experts = {name: dict(spec) if isinstance(spec, dict) else {"model": spec} for name, spec in experts.items()}
    if experts or specs["expert"]:  # where there is none, none was given: a template leaves them to be filled in
        values["experts"] = experts
    for name, model in specs["expert"].items():
        experts.setdefault(name, {})["model"] = model
        flags |= {f"experts.{name}{key}": f"--expert {name}" for key in ("", ".model")}
        flags["experts"] = "--expert"
    problems = []
    for key, kind in (("weight", float), ("base", str)):
        for name, value in specs[key].items():
            flags[f"experts.{name}.{key}"] = f"--{key} {name}"
            try:
                if name == "seed" and key == "weight":
                    values["seed_weight"] = kind(value)
                    flags["seed_weight"] = "--weight seed"
                else:
                    experts[name][key] = kind(value)
            except KeyError:
                expected = f"one of {', '.join(map(str, experts)) or 'the experts, of which there are none'}"
                problems.append(Problem("command", f"--{key}", f"no expert {name}", expected))
            except ValueError:
                problems.append(Problem("command", f"--{key}", f"{name}={value}", "a number"))
    return problems

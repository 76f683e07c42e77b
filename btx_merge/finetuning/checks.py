"""What can be known before anything heavy is imported: whether model, texts and places will do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem, collecting
from btx_merge.files.folder import read_json
from btx_merge.files.placing import check_target
from btx_merge.finetuning.ranks import own_rank
from btx_merge.finetuning.recipe import BranchRecipe, Recipe, TrainRecipe
from btx_merge.finetuning.work_folder import folder_problems, work_folder
from btx_merge.model.opening import find_model, overlap_problems, refused_config, room_problems
from btx_merge.sources.locate import Located
from btx_merge.sources.opening import open_whole
from btx_merge.sources.side_files import side_file_problems
from btx_merge.sources.source import SEED, Source
from btx_merge.sources.tensor_checks import expert_problems, tensor_problems
from btx_merge.sources.text_checks import check_texts
from btx_merge.sources.tokenizer_files import no_tokenizer
from btx_merge.texts.readers import missing_packages
from btx_merge.texts.windows import length_problems


def check_model(recipe: TrainRecipe, target: Path, resume: bool, overwrite: bool) -> Located:
    """Return the folder of the merged model that is to be finetuned.

    Raises:
        InputError: every reason not to begin.
    """
    located, of_model = find_model(recipe.model, target, overwrite)
    problems = _run_problems(recipe, located.folder if located else None)
    problems += of_model
    problems += folder_problems(work_folder(target), resume, own_rank() == 0, "train")
    if located:
        problems += _config_problems(recipe, read_json(located.folder / "config.json"))
    if problems or located is None:
        raise InputError(problems)
    return located


def check_seed(recipe: BranchRecipe, target: Path, resume: bool, overwrite: bool) -> Source:
    """Return the seed of which a copy is to be trained. Its weights are not read.

    Raises:
        InputError: every reason not to begin.
    """
    problems: list[Problem] = []
    seed: Source | None = None
    with collecting(problems):
        seed = open_whole(SEED, recipe.model)
        problems += _seed_problems(seed, target) + length_problems("max_length", recipe.max_length, seed.config)
    with collecting(problems):
        check_target(target, overwrite)
    problems = _run_problems(recipe, seed.located.folder if seed else None) + problems
    problems += folder_problems(work_folder(target), resume, own_rank() == 0, "branch")
    if seed and not problems:
        problems = refused_config(SEED, seed.located.folder)
    if problems or seed is None:
        raise InputError(problems)
    return seed


def _run_problems(recipe: Recipe, tokenizer: Path | None) -> list[Problem]:
    """Return what is wrong with the texts, and which packages a training lacks."""
    problems = check_texts(recipe.data, tokenizer)
    return problems + missing_packages(
        "accelerate", "matplotlib", *([] if "report_to" in recipe.arguments else ["tensorboard"])
    )


def _config_problems(recipe: TrainRecipe, config: Mapping[str, Any]) -> list[Problem]:
    """Return what the recipe asks for and a merged model of this config.json cannot do."""
    problems = length_problems("max_length", recipe.max_length, config)
    if recipe.train == "lora" and config.get("router_selection_bias"):
        found, remedy = "true: training moves the bias, and an adapter cannot hold it", "Train routers, shared or all."
        problems.append(Problem("model", "config.json: router_selection_bias", found, "false for a lora", remedy))
    if (experts := config["num_local_experts"]) % recipe.ep_size:
        found, expected = f"{recipe.ep_size} for {experts} experts", "as many experts on each rank"
        problems.append(Problem("recipe", "ep_size", found, expected, "Give another --ep-size."))
    return problems


def _seed_problems(seed: Source, target: Path) -> list[Problem]:
    """Return why a seed cannot be trained, or its branch not be merged or written."""
    folder = seed.located.folder
    problems = [*expert_problems(seed), *tensor_problems(seed), *overlap_problems(folder, target)]
    problems += side_file_problems(SEED, folder)
    problems += no_tokenizer(SEED, folder)
    return problems + room_problems(target, sum(tensor.nbytes for tensor in seed.tensors.values()))

"""The public verb `info`: what a merged model is, where it comes from, what was done with it, and what comes next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from btx_merge.architectures.btx import active_parameters, experts_by_domain, experts_per_token, merged_shapes
from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES, STORED, TORCH_NAMES, config_dtype
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.files.folder import checked, read_json
from btx_merge.model.files import REPORT
from btx_merge.model.merged import MergedModel, open_config, open_merged
from btx_merge.model.mixtral_limits import mixtral_refusals
from btx_merge.model.records import RECIPE_FILE, anchor_sources
from btx_merge.model.router_state import entries, untrained_experts, whole_trainings
from btx_merge.reporting import pasted, short
from btx_merge.sources.locate import Located, locate
from btx_merge.sources.source import SEED
from btx_merge.sources.tokenizer_files import has_tokenizer

_AT_COMMIT = re.compile(r"(.+/.+)@([0-9a-f]{40})")


@dataclass(frozen=True)
class ExpertInfo:
    """One expert of a merged model."""

    number: int
    """Its row of the routers, from 0."""
    name: str
    """Its name; of a split source `NAME.0`, `NAME.1`, ..."""
    model: str | None
    """The Hub id or the folder that it came from; None where the recipe does not say, or where it was blended."""
    revision: str | None
    """The commit of the Hub id."""
    base: str | None
    """Where that is an adapter with a base of its own: the base."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a merged model without reading its weights."""

    model: str
    """The folder or the Hub id, as it was given."""
    revision: str | None
    """The commit on the Hub."""
    experts: tuple[ExpertInfo, ...]
    """Its experts, in the order of the routers' rows."""
    expert_mode: str | None
    """whole, split or blend; None where there is no recipe."""
    combine: str | None
    """How the shared weights were combined; None where there is no recipe."""
    router_type: str
    """How the routers choose: top_k, switch, soft or sample_top_1."""
    experts_per_token: int
    """How many experts run for one token in inference."""
    routers: str
    """How the routers came to be: random, zeros, fitted, trained, or unknown where there is no recipe."""
    untrained: tuple[str, ...]
    """Experts whose router rows nobody has fitted or trained yet."""
    parameters: int
    """All weights."""
    active_parameters: int
    """Weights that one token passes through."""
    dtype: str
    """torch's name of the dtype that the experts are stored in."""
    nbytes: int
    """Size of the weights, in bytes."""
    disk_bytes: int | None
    """Size of all files in the folder, in bytes; None for a model on the Hub."""
    tokenizer: bool
    """Whether it has a tokenizer."""
    history: tuple[str, ...]
    """What was done with it, a line each."""
    next: tuple[str, ...]
    """Commands that lead on from here."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return asdict(self)


def info(model: str) -> ModelInfo:
    """Return what a merged model is. Of a model on the Hub, only the small files are downloaded.

    Args:
        model: a folder, `org/name` or `org/name@revision`.

    Raises:
        InputError: it is no merged model, or one with something wrong; the error says what else the folder is.
    """
    located = locate("model", model, weights=False)
    if located.repo_id:
        merged = open_config(located)
        shapes = merged_shapes(merged.config)
        dtype = str(config_dtype(merged.config) or "float32")
        itemsize = STORED[SAFETENSORS_NAMES[dtype]].itemsize if dtype in SAFETENSORS_NAMES else 4
        nbytes = itemsize * sum(map(math.prod, shapes.values()))
    else:
        merged = open_merged(located)
        shapes = {name: tensor.shape for name, tensor in merged.tensors.items()}
        dtype, nbytes = TORCH_NAMES[merged.dtype], sum(tensor.nbytes for tensor in merged.tensors.values())
    recipe = _recipe(located)
    router_type = str(merged.router_type)
    per_token = experts_per_token(router_type, merged.num_experts_per_tok, merged.num_experts)
    untrained = tuple(untrained_experts(recipe, merged.config))
    return ModelInfo(
        model=str(model),
        revision=located.revision,
        experts=tuple(_experts(merged, recipe)),
        expert_mode=_word(recipe, "expert_mode"),
        combine=_word(recipe, "combine"),
        router_type=router_type,
        experts_per_token=per_token,
        routers=_routers(recipe),
        untrained=untrained,
        parameters=sum(map(math.prod, shapes.values())),
        active_parameters=active_parameters(shapes, merged.num_experts, per_token),
        dtype=dtype,
        nbytes=nbytes,
        disk_bytes=None if located.repo_id else _disk_bytes(located),
        tokenizer=has_tokenizer(located.folder),
        history=tuple(_history(recipe)),
        next=tuple(_next(str(model), merged, recipe, untrained)),
    )


def next_commands(result: str | Path) -> tuple[str, ...]:
    """Return the commands that lead on from what a verb has written: the next verb, or a program that serves it.

    Args:
        result: a merged model, an export (a GGUF is a file), an extracted expert, an adapter, or a report.

    Raises:
        InputError: it is none of these.
    """
    path, given = Path(result), pasted(str(result))
    if path.is_file():
        return (f"llama-server -m {given}",)
    if (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        trained_on_folder = isinstance(base, str) and Path(base).is_dir()
        return (f"btx push {given} ORG/NAME" + (" --base-model ORG/BASE" if trained_on_folder else ""),)
    if (path / REPORT).exists():
        return (f"python -m webbrowser {(path / REPORT).resolve().as_uri()}",)  # on a Mac it takes no path
    kind = read_json(path / "config.json").get("model_type")
    if kind == "btx":
        return info(str(result)).next
    return (*((f"vllm serve {given}",) if kind == "mixtral" else ()), f"btx push {given} ORG/NAME")


def _recipe(located: Located) -> dict[str, Any]:
    """Return what the model's recipe says; nothing where it has none, as a model that was built from scratch."""
    file = located.folder / RECIPE_FILE
    return read_yaml(checked(file), "model", "what btx merge wrote") if file.exists() else {}


def _disk_bytes(located: Located) -> int:
    return sum(file.stat().st_size for file in located.folder.rglob("*") if file.is_file())


def _word(recipe: Mapping[str, Any], key: str) -> str | None:
    value = recipe.get(key)
    return value if isinstance(value, str) else None


def _experts(merged: MergedModel, recipe: Mapping[str, Any]) -> Iterator[ExpertInfo]:
    specs: dict[str, Any] = {}  # a blended expert came from no single model
    if recipe.get("expert_mode") != "blend":
        given = recipe.get("experts")
        specs = {SEED: recipe.get("seed"), **(given if isinstance(given, dict) else {})}
    domains = [domain for domain, numbers in experts_by_domain(merged.config).items() for _ in numbers]
    for number, (name, domain) in enumerate(zip(merged.expert_names, domains, strict=True)):
        spec = specs.get(domain)
        values = spec if isinstance(spec, dict) else {"model": spec}
        model, revision = _word(values, "model"), None
        if match := _AT_COMMIT.fullmatch(model or ""):
            model, revision = match.groups()
        yield ExpertInfo(number, name, model, revision, _word(values, "base"))


def _routers(recipe: Mapping[str, Any]) -> str:
    if whole_trainings(recipe):
        return "trained"
    if entries(recipe, "fits") or recipe.get("router_init") in ("ridge", "logistic", "prompts"):
        return "fitted"
    return _word(recipe, "router_init") or "unknown"


def _history(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Tell what was done, each kind in its order. The order between two kinds is not recorded."""
    if "seed" in recipe:
        combine, init = (short(recipe.get(key)).strip("'") for key in ("combine", "router_init"))
        head = ", head fitted" if recipe.get("head") == "fitted" else ""
        yield f"merged: shared weights {combine}{head}, routers {init}"
    for entry in entries(recipe, "edits"):
        done = [f"{key} {_names(entry[key])}" for key in ("drop", "add", "replace", "rename") if entry.get(key)]
        rows = entry.get("router_rows")
        drawn = [f"the router row of {name} {init}" for name, init in rows.items()] if isinstance(rows, dict) else []
        yield f"edited: {', '.join([*done, *drawn])}; shared weights {entry.get('shared')}"
    for entry in entries(recipe, "fits"):
        yield f"routers fitted: {entry.get('method')}"
    for entry in entries(recipe, "training"):
        texts = ", ".join(str(text.get("name")) for text in entries(entry, "data")) or "unknown texts"
        yield f"trained: {entry.get('train')}, {entry.get('steps')} steps, {entry.get('tokens')} tokens of {texts}"


def _names(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{old} to {new}" for old, new in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source_flags(folder: Path, recipe: Mapping[str, Any]) -> str:
    """Return what `btx eval` has to be told of sources: of folders, a recipe has the name and no path."""
    if not recipe.get("seed"):
        return " --no-sources"
    folder = folder.resolve()
    anchored = anchor_sources(recipe, [folder, folder.parent])  # where `btx eval` looks
    experts = anchored.get("experts")
    flags = ""
    for name, spec in {SEED: anchored["seed"], **(experts if isinstance(experts, dict) else {})}.items():
        model = spec.get("model") if isinstance(spec, dict) else spec
        if isinstance(model, str) and "/" not in model and "@" not in model:  # no path was found, and it is no Hub id
            flags += f" --source {pasted(f'{name}=MODEL')}"
    return flags


def _next(model: str, merged: MergedModel, recipe: Mapping[str, Any], untrained: tuple[str, ...]) -> Iterator[str]:
    given, name = pasted(model), merged.located.public_name.rpartition("/")[2]
    fitted, trained, mixtral, routing = (
        pasted(f"{name}-{kind}") for kind in ("fitted", "trained", "mixtral", "routing")
    )
    is_blended = recipe.get("expert_mode") == "blend"  # the domains are still those of the sources
    domains = [domain for domain in (recipe["experts"] if is_blended else merged.domains) if domain != SEED]
    data = " ".join(f"--data {pasted(f'{domain}=TEXT')}" for domain in domains)
    if untrained:
        texts = " ".join(f"--domain-text {pasted(f'{domain}=TEXT')}" for domain in domains)
        if not is_blended:
            yield f"btx fit {given} {texts} -o {fitted}"
        yield f"btx train {given} {data} --train routers -o {trained}"
        return
    if not any(mixtral_refusals(merged)):
        yield f"btx export {given} {mixtral}"
    if not merged.located.repo_id:
        yield f"btx push {given} ORG/NAME"
    yield f"btx eval {given} {data}{_source_flags(merged.located.folder, recipe)}"
    yield f"btx routing {given} {data} -o {routing}"

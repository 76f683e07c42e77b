"""The public verbs `export`, a merged model for other programs, and `extract`, one expert of it as a dense Llama.

Both copy ranges of the model's bytes under other names: nothing is converted, so nothing is rounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.checkpoints.copying import copy_layout, copy_staging
from btx_merge.checkpoints.layout import write_index
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import InputError, Problem, collecting
from btx_merge.exporting.files import check_tokenizer, origin, shared_config, untrained_routers, write_export_files
from btx_merge.exporting.gguf import file_problems, find_converter, no_converter, write_gguf
from btx_merge.exporting.mixtral import mixtral_card, mixtral_config, mixtral_tensors
from btx_merge.files.disk_errors import continuable
from btx_merge.files.placing import place_of
from btx_merge.files.scratch import move_in
from btx_merge.model.card import CITATION, how_to_use
from btx_merge.model.merged import MergedModel
from btx_merge.model.mixtral_limits import mixtral_refusals, mixtral_warnings
from btx_merge.model.opening import open_model
from btx_merge.options import Options, refuse_unused
from btx_merge.reporting import Reporter, peak_memory
from btx_merge.sources.cards import in_card
from btx_merge.values import parse_size, size_problem

FORMATS = ("mixtral", "gguf")
_OPTIONS = ("overwrite", "workers", "max_shard_size")
"""Those of `Options` that an export takes."""


@dataclass(frozen=True)
class ExportReport:
    """What an export, or the extraction of an expert, did."""

    output: Path
    """The folder of the result; of a GGUF, the file."""
    parameters: int
    """How many weights the result has."""
    files: tuple[str, ...]
    """Names of the weights files."""
    nbytes: int
    """Size of those files, in bytes."""
    kept_bytes: int
    """How many of these bytes an earlier, interrupted run had written."""
    seconds: float
    """Wall time in seconds, checks included."""
    peak_memory: int
    """Largest resident size of the process so far, in bytes."""
    warnings: tuple[Problem, ...] = ()
    """Routers that are not trained yet, and programs that will not compute of the result what the model does."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        warnings = [str(warning) for warning in self.warnings]
        return {**asdict(self), "output": str(self.output), "files": list(self.files), "warnings": warnings}


@dataclass(frozen=True)
class _Derived:
    """What becomes of a model."""

    tensors: Mapping[str, StoredTensor]
    """Every tensor of the result by its name there, as ranges of the model's own files."""
    config: Mapping[str, Any]
    """Its config.json, but for what all results have in common."""
    tags: list[str]
    """For the card's metadata."""
    card: str
    """The card's text, without metadata."""
    keeps_figures: bool
    """Whether it computes what the model does, so that the model's held-out figures hold for it too."""
    warnings: tuple[Problem, ...] = ()


def export(
    model: str,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
    *,
    format: str = "mixtral",
    llama_cpp: str | Path | None = None,
) -> ExportReport:
    """Write a merged model as a Mixtral of transformers into the folder `output`. Its logits are the same bits.

    An interrupted export leaves `OUTPUT.btx-partial`; the same call continues it. One to GGUF begins anew.

    Args:
        model: a folder, `org/name` or `org/name@revision`.
        options: `overwrite`, `workers` and `max_shard_size`; a GGUF is one file.
        format: `mixtral`, the layout that transformers, vLLM, SGLang and llama.cpp's converter read; or `gguf`, for
            which that converter is run. `output` is a file then.
        llama_cpp: the folder of llama.cpp with its converter; by default the one that the environment variable
            LLAMA_CPP names, or else the converter that is on PATH.

    Raises:
        InputError: a reason to refuse, such as a routing that a Mixtral does not have; nothing has been written.
        MergeError: the disk refused; `MergeInterrupted` for Ctrl-C; `output` is as it was.
    """
    began = time.perf_counter()
    refuse_unused(options, "export", *_OPTIONS)
    target = place_of(output)
    problems, is_gguf = [], format == "gguf"
    converter = find_converter(llama_cpp) if is_gguf else []
    if format not in FORMATS:
        problems.append(Problem("command", "--format", repr(format), " or ".join(FORMATS)))
    if is_gguf:
        problems += file_problems(target, options.overwrite)

    def derive(merged: MergedModel) -> _Derived:
        refusals = list(mixtral_refusals(merged))
        if is_gguf and not converter:
            refusals.append(no_converter(llama_cpp, model, target, merged.dtype))
        if refusals:
            raise InputError(refusals)
        tags = ["mixtral", "mixture-of-experts", "merge"]
        untrained = untrained_routers(merged)
        warnings, card = tuple(mixtral_warnings(merged, untrained)), mixtral_card(merged, untrained)
        return _Derived(mixtral_tensors(merged), mixtral_config(merged), tags, card, True, warnings)

    checked = _check(model, None if is_gguf else target, derive, problems, options)
    if not is_gguf:
        return _write(checked, target, began, options, reporter)

    reports: list[ExportReport] = []
    name = checked.merged.located.public_name.rpartition("/")[2]
    write_gguf(
        lambda folder: reports.append(_write(checked, folder, began, replace(options, overwrite=False), reporter)),
        target,
        name,
        checked.merged.dtype,
        converter,
    )
    seconds, nbytes = time.perf_counter() - began, target.stat().st_size
    return replace(reports[0], output=target, files=(target.name,), nbytes=nbytes, seconds=seconds)


def extract(
    model: str,
    expert: str,
    output: str | Path,
    options: Options = Options(),
    reporter: Reporter = Reporter(),
) -> ExportReport:
    """Write one expert with the merged shared weights as a dense Llama into the folder `output`.

    It computes what the model computes when every token goes to that expert. A split source is put together again.

    Args:
        expert: its name.

    The other arguments, and what is raised, are those of `export`.
    """

    def derive(merged: MergedModel) -> _Derived:
        tensors = merged.dense_tensors(expert)
        return _Derived(tensors, _dense_config(merged), ["llama", "merge"], _dense_card(merged, expert), False)

    began = time.perf_counter()
    refuse_unused(options, "extract", *_OPTIONS)
    target = place_of(output)
    checked = _check(model, target, derive, [], options)
    return _write(checked, target, began, options, reporter)


@dataclass(frozen=True)
class _Checked:
    """A model, what becomes of it, and how large its weights files may be."""

    merged: MergedModel
    """The model that is read."""
    derived: _Derived
    """What is written."""
    shard_bytes: int
    """Bytes of a weights file, at most."""


def _check(
    model: str,
    target: Path | None,
    derive: Callable[[MergedModel], _Derived],
    problems: list[Problem],
    options: Options,
) -> _Checked:
    """Check all before anything is written.

    Args:
        target: the folder for the result; None where the result is no folder.
        problems: those that are known.

    Raises:
        InputError: with these and all others.
    """
    size = options.max_shard_size
    shard_bytes = parse_size(size) if isinstance(size, str) else None
    if not shard_bytes:
        problems.append(size_problem("--max-shard-size", size))
    merged, of_model = open_model(model, target, options.overwrite)
    problems += of_model
    derived = None
    if merged:
        with collecting(problems):
            derived = derive(merged)
            warnings = check_tokenizer(merged, derived.config)
            derived = replace(derived, warnings=(*derived.warnings, *warnings))
    if problems or not (merged and derived and shard_bytes):
        raise InputError(problems)
    return _Checked(merged, derived, shard_bytes)


def _write(checked: _Checked, target: Path, began: float, options: Options, reporter: Reporter) -> ExportReport:
    """Write a checked model into the folder `target`, its config.json last."""
    merged, derived = checked.merged, checked.derived
    for warning in derived.warnings:
        reporter.warn(str(warning))
    layout = copy_layout(derived.tensors, checked.shard_bytes)
    with (
        continuable(target),
        copy_staging(layout, merged.located.folder, merged.located.stamps, target, reporter) as staging,
    ):
        staging.write(options.workers)
        files = staging.scratch()
        write_index(layout, files)
        write_export_files(
            merged,
            files,
            config=derived.config,
            tags=derived.tags,
            card=derived.card,
            keeps_figures=derived.keeps_figures,
        )
        move_in(files, staging.folder)
        staging.finish(options.overwrite)
    return ExportReport(
        target,
        layout.parameters,
        tuple(shard.name for shard in layout.shards),
        layout.bytes_to_write,
        staging.kept_bytes,
        time.perf_counter() - began,
        peak_memory(),
        derived.warnings,
    )


def _dense_config(model: MergedModel) -> dict[str, Any]:
    """Return the config.json of the dense Llama that one expert is."""
    shared = shared_config(model)
    biases = {key: model.dense_config[key] for key in ("attention_bias", "mlp_bias")}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shared, **biases}


def _dense_card(model: MergedModel, expert: str) -> str:
    """Return the text of an extracted expert's card."""
    return f"""# The expert {expert} of {in_card(model.located.public_name.rpartition("/")[2])}

{origin(model, f"btx extract {expert}")}

A dense Llama: the feed-forward blocks of `{expert}` with the attention, embeddings, norms and head that all experts of
that model share. It computes what the model computes when every token goes to `{expert}`; it is not the checkpoint
that `{expert}` was before the merge, whose other weights were combined with its siblings'.

{how_to_use()}
{CITATION}"""

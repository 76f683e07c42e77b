"""`btx export` and `btx extract`: a merged model for other programs, and one expert of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btx_merge.cli.options import Json, MaxShardSize, Model, Output, Overwrite, Quiet, Workers, option
from btx_merge.cli.printing import print_json, tell_next
from btx_merge.cli.terminal import terminal
from btx_merge.errors import InputError, Problem
from btx_merge.options import Options

if TYPE_CHECKING:
    from btx_merge.exporting.run import ExportReport


def export_command(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(help="Folder (or GGUF file) for the result.", show_default=False)
    ] = None,
    output: Annotated[Path | None, option("The same as the argument, as an option.", "--output", "-o")] = None,
    format: Annotated[
        str,
        typer.Option(help="mixtral: for transformers, vLLM, SGLang, llama.cpp; gguf: by llama.cpp's converter."),
    ] = "mixtral",
    max_shard_size: MaxShardSize = "5GB",
    llama_cpp: Annotated[
        Path | None, option("Folder of llama.cpp, for gguf [default: $LLAMA_CPP, or the converter on PATH].")
    ] = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Write a merged model as a Mixtral or a GGUF, for other programs."""
    from btx_merge.exporting.run import export

    folder = out or output
    if folder is None or (out and output):
        raise InputError([Problem("command", "OUT", "given twice" if folder else "missing", "one folder")])
    options = Options(overwrite, workers, max_shard_size=max_shard_size)
    with terminal(quiet, "exporting") as reporter:
        report = export(model, folder, options, reporter, format=format, llama_cpp=llama_cpp)
    _tell(report, folder, quiet, json_output)


def extract_command(
    model: Model,
    expert: Annotated[str, typer.Argument(help="Name of the expert.")],
    output: Output,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Take one expert out, as a dense Llama.

    It gets the shared weights of the merged model.
    """
    from btx_merge.exporting.run import extract

    options = Options(overwrite, workers, max_shard_size=max_shard_size)
    with terminal(quiet, "extracting") as reporter:
        report = extract(model, expert, output, options, reporter)
    _tell(report, output, quiet, json_output)


def _tell(report: ExportReport, written: Path, quiet: bool, json_output: bool) -> None:
    if json_output:
        print_json(report)
    elif not quiet:
        from btx_merge.cli.display import print_export

        print_export(report)
        tell_next(written)

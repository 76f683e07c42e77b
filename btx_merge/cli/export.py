"""`btx export` and `btx extract`: a merged model for other programs, and one expert of it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btx_merge.cli.options import Json, Model, Output, Overwrite, Quiet, Workers, option
from btx_merge.cli.printing import note, tell_next, warn
from btx_merge.errors import InputError, Problem

if TYPE_CHECKING:
    from btx_merge.exporting.run import ExportReport


_MaxShardSize = Annotated[str, typer.Option(help="Largest weights file.")]


def export_command(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(help="Folder (or GGUF file) for the result.", show_default=False)
    ] = None,
    output: Annotated[Path | None, option("The same, as an option.", "--output", "-o")] = None,
    format: Annotated[
        str, typer.Option(help="mixtral: for transformers, vLLM, SGLang, llama.cpp; gguf: by llama.cpp's converter.")
    ] = "mixtral",
    max_shard_size: _MaxShardSize = "5GB",
    llama_cpp: Annotated[
        Path | None, option("Folder of llama.cpp, for gguf [default: $LLAMA_CPP, or its converter on PATH].")
    ] = None,
    overwrite: Overwrite = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Write a merged model in a layout that other programs serve."""
    from btx_merge.exporting.run import export

    folder = out or output
    if folder is None or (out and output):
        raise InputError([Problem("command", "OUT", "given twice" if folder else "missing", "one folder")])
    _run(
        "exporting",
        folder,
        lambda **shown: export(
            model,
            folder,
            format=format,
            max_shard_size=max_shard_size,
            llama_cpp=llama_cpp,
            overwrite=overwrite,
            workers=workers,
            **shown,
        ),
        quiet,
        json_output,
    )


def extract_command(
    model: Model,
    expert: Annotated[str, typer.Argument(help="Its name.")],
    output: Output,
    max_shard_size: _MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Take one expert out, as a dense Llama with the merged shared weights."""
    from btx_merge.exporting.run import extract

    _run(
        "extracting",
        output,
        lambda **shown: extract(
            model, expert, output, overwrite=overwrite, workers=workers, max_shard_size=max_shard_size, **shown
        ),
        quiet,
        json_output,
    )


def _run(verb: str, written: Path, work: Callable[..., ExportReport], quiet: bool, json_output: bool) -> None:
    """Does the work under a bar, and prints what it did."""
    from btx_merge.cli.display import ProgressBar, print_export

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: resumable, one line
    with ProgressBar(not quiet and sys.stderr.isatty(), verb) as bar:
        report = work(progress=bar.advance, on_start=bar.start, on_note=note)
    warn(report.warnings)
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        print_export(report)
        tell_next(written)

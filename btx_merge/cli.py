"""The command `btx`: parses, calls the public functions, prints. Results on stdout, all else on stderr."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from btx_merge.cli_edit import edit_command
from btx_merge.cli_export import export_command, extract_command
from btx_merge.cli_fit import fit_command
from btx_merge.cli_options import Device, Json, Overwrite, Quiet, Workers, lists, option, pairs
from btx_merge.cli_print import error as print_error
from btx_merge.cli_print import note, warn
from btx_merge.cli_push import push_command
from btx_merge.cli_train import train_command
from btx_merge.errors import BTXError, InputError, MergeInterrupted, Problem
from btx_merge.recipe import COMBINE_METHODS, EXPERT_MODES, FIT_THROUGH, ROUTER_INITS, ROUTER_TYPES, MergeRecipe
from btx_merge.records import read_recipe_file
from btx_merge.texts import parse_domain_texts

app = typer.Typer(
    name="btx",
    help="Merge fine-tuned Llama checkpoints grown from one seed into one Mixture of Experts (Branch-Train-MiX).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _main() -> None:
    """With this, one command more does not change how the others are called."""


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
        str | None, option(f"{', '.join(COMBINE_METHODS)}: rule for shared weights [default: mean].")
    ] = None,
    density: Annotated[float | None, option("ties, dare_*: kept part of a difference [default: 0.8].")] = None,
    scale: Annotated[float | None, option("ties, dare_*: factor on the difference [default: 1].")] = None,
    expert_mode: Annotated[str | None, option(f"{', '.join(EXPERT_MODES)} [default: whole].")] = None,
    num_chunks: Annotated[int | None, option("split: experts per source [default: 2].")] = None,
    fold_norms: Annotated[
        bool | None, option("Experts absorb the ratio of their own norm to the merged one.", "--fold-norms")
    ] = None,
    router_init: Annotated[str | None, option(f"{', '.join(ROUTER_INITS)} [default: random].")] = None,
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
        str | None, option(f"{', '.join(FIT_THROUGH)}: what leads to the next layer to be fitted [default: expert].")
    ] = None,
    router_type: Annotated[str | None, option(f"{', '.join(ROUTER_TYPES)} [default: top_k].")] = None,
    router_pre_softmax: Annotated[
        bool | None, option("top_k: softmax before the selection, for split experts.", "--router-pre-softmax")
    ] = None,
    num_experts_per_tok: Annotated[int | None, option("Experts per token [default: 2].")] = None,
    router_aux_loss_coef: Annotated[
        float | None, option("Coefficient of the load balancing loss [default: 0.01].")
    ] = None,
    dtype: Annotated[str | None, option("bfloat16, float16 or float32 [default: the seed's].")] = None,
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
) -> MergeRecipe:
    """The recipe from a file and from flags, which win."""
    flags = {key: value for key, value in locals().items() if value is not None}
    given = {key: pairs(f"--{key}", flags.pop(key, [])) for key in ("expert", "weight", "base")}
    texts = parse_domain_texts("--domain-text", flags.pop("domain_text", []))
    prompts = lists("--prompt", flags.pop("prompt", []))
    file = flags.pop("recipe", None)
    values = read_recipe_file(file, note) if file else {}
    values |= flags
    for key, named in (("domain_text", {text.name: text for text in texts}), ("prompts", prompts)):
        if named:
            before = values.get(key)
            values[key] = {**before, **named} if isinstance(before, dict) else named
    typed = {key: f"--{key.replace('_', '-')}" for key in flags}  # what to call them when they are wrong
    experts = values.get("experts") or {}
    if isinstance(experts, dict):
        experts = {name: dict(spec) if isinstance(spec, dict) else {"model": spec} for name, spec in experts.items()}
        values["experts"] = experts
    for name, model in given["expert"].items() if isinstance(experts, dict) else ():
        experts.setdefault(name, {})["model"] = model
        typed |= {f"experts.{name}{key}": f"--expert {name}" for key in ("", ".model")}
        typed["experts"] = "--expert"
    problems = []
    for key, kind in (("weight", float), ("base", str)):
        for name, value in given[key].items() if isinstance(experts, dict) else ():
            typed[f"experts.{name}.{key}"] = f"--{key} {name}"
            try:
                if name == "seed" and key == "weight":
                    values["seed_weight"] = kind(value)
                    typed["seed_weight"] = "--weight seed"
                else:
                    experts[name][key] = kind(value)
            except KeyError:
                expected = f"one of {', '.join(map(str, experts)) or 'the experts, of which there are none'}"
                problems.append(Problem("command", f"--{key}", f"no expert {name}", expected))
            except ValueError:
                problems.append(Problem("command", f"--{key}", f"{name}={value}", "a number"))
    try:
        recipe_of_both = MergeRecipe.from_dict(values, str(file or "command"))
    except InputError as error:
        problems += [
            replace(problem, source="command", where=typed[problem.where]) if problem.where in typed else problem
            for problem in error.problems
        ]
    if problems:
        raise InputError(problems)
    return recipe_of_both


def _ends_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turns our errors into lines and exit codes. Nobody gets a traceback for a mistake of theirs."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        as_json = values.get("json_output", False)
        try:
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


def _takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the recipe's options beside its own."""
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


def _failed(error: BaseException, lines: list[str], code: int, as_json: bool) -> typer.Exit:
    if as_json:
        print(json.dumps({"error": type(error).__name__, "problems": lines}, indent=2))
    for line in lines:
        print_error(line)
    return typer.Exit(code)


@app.command("check")
@_ends_in_one_line
@_takes_recipe
def check_command(
    recipe: MergeRecipe,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say all that would be refused, and what the merge would be. Writes nothing."""
    from btx_merge.merging import check
    from btx_merge.tables import print_check

    checked = check(recipe)
    if json_output:
        print(json.dumps(checked.to_dict(), indent=2))
    else:
        print_check(checked)
    warn(checked.warnings)


@app.command("merge")
@_ends_in_one_line
@_takes_recipe
def merge_command(
    recipe: MergeRecipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    overwrite: Overwrite = False,
    workers: Workers = None,
    statistics: Annotated[
        Path | None, option("Folder for what a fit learns of the texts: kept there, or taken from there.")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Merge the checkpoints of a recipe into one model."""
    from btx_merge.merging import Check, merge
    from btx_merge.tables import LayerBar, ProgressBar, print_report

    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: resumable, one line
    shown = not quiet and sys.stderr.isatty()
    with ProgressBar(shown) as bar, LayerBar(shown) as layers:

        def on_checked(checked: Check) -> None:
            warn(checked.warnings)
            bar.start(sum(job.nbytes for job in checked.plan.jobs))

        report = merge(
            recipe,
            output,
            overwrite=overwrite,
            workers=workers,
            progress=bar.advance,
            on_checked=on_checked,
            on_note=note,
            statistics=statistics,
            device=device,
            on_layer=layers.advance,
        )
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        print_report(report)


app.command("fit")(_ends_in_one_line(fit_command))
app.command("edit")(_ends_in_one_line(edit_command))
app.command("push")(_ends_in_one_line(push_command))
app.command("export")(_ends_in_one_line(export_command))
app.command("extract")(_ends_in_one_line(extract_command))
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    _ends_in_one_line(train_command)
)


def main() -> None:
    """Entry point of the console script."""
    # Read when torch is imported: threads that wait for each other give up their core soon. Where another program
    # keeps one of two cores busy, a fit takes a quarter of the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except KeyboardInterrupt:  # before anything was written
        print("error: Interrupted.", file=sys.stderr)
        sys.exit(130)

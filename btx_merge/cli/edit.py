"""`btx edit`: experts of a merged model added, dropped, replaced, renamed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from btx_merge.cli.options import Device, Json, Model, Output, Overwrite, Quiet, Workers, option, pairs
from btx_merge.cli.printing import print_json, result, tell_next
from btx_merge.cli.terminal import terminal
from btx_merge.editing.recipe import ROW_INITS, SHARED_UPDATES, EditRecipe
from btx_merge.errors import InputError, Problem
from btx_merge.options import Options
from btx_merge.texts.references import parse_domain_texts


def edit_command(
    model: Model,
    output: Output,
    add: Annotated[
        list[str] | None, option("Again: a checkpoint or a PEFT adapter that becomes an expert.", metavar="NAME=MODEL")
    ] = None,
    drop: Annotated[list[str] | None, option("Again: an expert that goes.", metavar="NAME")] = None,
    replace: Annotated[
        list[str] | None, option("Again: another model in an expert's place.", metavar="NAME=MODEL")
    ] = None,
    rename: Annotated[list[str] | None, option("Again: an expert's new name.", metavar="OLD=NEW")] = None,
    shared: Annotated[
        str | None,
        option(
            f"{', '.join(SHARED_UPDATES)}: whether shared weights move as if merged with the new set; auto: where the "
            "sources are there [default: auto].",
            choices=SHARED_UPDATES,
        ),
    ] = None,
    source: Annotated[
        list[str] | None, option("Again: where a source of the model's recipe lies now.", metavar="NAME=MODEL")
    ] = None,
    weight: Annotated[
        list[str] | None, option("Share of a new expert in a weighted combining.", metavar="NAME=NUMBER")
    ] = None,
    base: Annotated[
        list[str] | None, option("What a new adapter was trained on, if not the seed.", metavar="NAME=MODEL")
    ] = None,
    router_init: Annotated[
        str | None,
        option(
            f"{', '.join(ROW_INITS)}: rows of new experts [default: ridge with text; else random, or as it was].",
            choices=ROW_INITS,
        ),
    ] = None,
    router_std: Annotated[
        float | None, option("Deviation of random rows [default: the model's initializer_range].")
    ] = None,
    random_seed: Annotated[int | None, option("Seed of random rows [default: 0].")] = None,
    domain_text: Annotated[
        list[str] | None,
        option("Again: text of a new expert's domain; of others' for contrast.", metavar="NAME=TEXT[:WEIGHT]"),
    ] = None,
    domain_tokens: Annotated[int | None, option("Tokens read of each domain [default: 200000].")] = None,
    router_ridge: Annotated[float | None, option("Relative penalty [default: 0.001].")] = None,
    num_experts_per_tok: Annotated[int | None, option("Experts per token from now on [default: as before].")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where a source holds NaN or Inf.")
    ] = False,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Go on where a source did not grow from the seed.")
    ] = False,
    device: Device = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Add, drop, replace or rename experts of a merged model, without a new merge."""
    from btx_merge.cli.display import fit_line
    from btx_merge.editing.run import edit

    new = {"add": pairs("--add", add or []), "replace": pairs("--replace", replace or [])}
    specs: dict[str, Any] = {name: {"model": model} for named in new.values() for name, model in named.items()}
    for key, values in (("weight", pairs("--weight", weight or [])), ("base", pairs("--base", base or []))):
        for name, value in values.items():
            if name not in specs:
                known = f"one of {', '.join(specs) or 'those that are added or replaced, of which there are none'}"
                raise InputError([Problem("command", f"--{key}", f"no new expert {name}", known)])
            specs[name][key] = _number(name, value) if key == "weight" else value
    given: dict[str, Any] = {
        "shared": shared,
        "router_init": router_init,
        "router_std": router_std,
        "random_seed": random_seed,
        "domain_tokens": domain_tokens,
        "router_ridge": router_ridge,
        "num_experts_per_tok": num_experts_per_tok,
    }
    recipe = EditRecipe(
        model,
        tuple(drop or ()),
        add={name: specs[name] for name in new["add"]},
        replace={name: specs[name] for name in new["replace"]},
        rename=pairs("--rename", rename or []),
        sources=pairs("--source", source or []),
        domain_text=parse_domain_texts("--domain-text", domain_text or []),
        allow_nonfinite=allow_nonfinite,
        allow_unrelated=allow_unrelated,
        **{name: value for name, value in given.items() if value is not None},
    )
    with terminal(quiet, "editing") as reporter:
        report = edit(recipe, output, Options(overwrite, workers, device), reporter)
    if json_output:
        print_json(report)
    elif not quiet:
        result(f"written  {report.output}")
        result(f"experts  {', '.join(report.experts)}")
        result(f"shared   {report.shared}: {report.shared_reason}")
        if report.router_rows:
            result(f"rows     {', '.join(f'{name} {init}' for name, init in report.router_rows.items())}")
        if report.layers:
            result(f"routers  {fit_line(report.layers)}")
        result(f"took     {report.seconds:.1f} s")
        tell_next(output)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError([Problem("command", "--weight", f"{name}={value}", "a number")]) from error

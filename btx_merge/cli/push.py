"""`btx push`: a model or an adapter to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from btx_merge.cli.options import Json, Quiet, option
from btx_merge.cli.printing import print_json, result
from btx_merge.cli.terminal import hush, terminal
from btx_merge.reporting import readable


def push_command(
    model: Annotated[str, typer.Argument(help="Folder of a merged, exported or extracted model, or of an adapter.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; created if it is missing.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository; refuse one that is public.")
    ] = False,
    revision: Annotated[str | None, option("Branch; created if it is missing [default: main].")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
    ] = False,
    base_model: Annotated[
        str | None, option("Base on the Hub, ORG/NAME[@REVISION], of an adapter that was trained on a folder.")
    ] = None,
    commit_message: Annotated[str | None, option("First line of the commit.")] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Check a model or an adapter, and publish it on the Hub."""
    hush(quiet)
    from btx_merge.publishing.run import push

    with terminal(quiet) as reporter:
        report = push(
            model,
            repo_id,
            reporter,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            base_model=base_model,
        )
    if json_output:
        print_json(report)
    elif not quiet:
        if not report.files and not report.deleted:
            result(f"unchanged {report.url} holds this very model; nothing was committed")
            return
        result(f"published {report.url} (commit {report.commit[:8]})")
        result(f"files     {len(report.files)} new or changed, {readable(report.nbytes)}")
        if report.deleted:
            result(f"deleted   {', '.join(report.deleted)}, of an earlier model")
        if report.adapted:
            result(f"adapted   {' and '.join(report.adapted)}, to their place on the Hub; the folder stays as it is")
        result(f"took      {report.seconds:.1f} s")

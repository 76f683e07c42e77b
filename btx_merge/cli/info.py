"""`btx info`: what a merged model is."""

from __future__ import annotations

from btx_merge.cli.options import Json, Model
from btx_merge.cli.printing import print_json


def info_command(model: Model, json_output: Json = False) -> None:
    """Show what a merged model is, its origin, and what comes next. Reads no weights."""
    from btx_merge.cli.display import print_info
    from btx_merge.model.info import info

    found = info(model)
    if json_output:
        print_json(found)
    else:
        print_info(found)

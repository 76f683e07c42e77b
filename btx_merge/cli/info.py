"""`btx info`: what a merged model is."""

from __future__ import annotations

import json

from btx_merge.cli.options import Json, Model


def info_command(model: Model, json_output: Json = False) -> None:
    """Say what a merged model is, where it comes from, and what comes next. Reads no weights."""
    from btx_merge.cli.display import print_info
    from btx_merge.model.info import info

    found = info(model)
    if json_output:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_info(found)

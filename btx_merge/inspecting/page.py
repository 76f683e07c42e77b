"""The page: one file of HTML that needs no server and no network, made from a template and the figures.

All that comes from outside, texts and names, lies in a block of JSON that no browser takes for a script, and becomes
text on the page, never markup. The page's own script and style are named to the browser by their hashes, so it runs
and loads nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from btx_merge.inspecting.figures import ModelFigures
from btx_merge.inspecting.page_text import PageText

_HTML_SIGNS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
"""Signs that could end the block of JSON, and how JSON writes them."""


def page_html(model: ModelFigures, against: ModelFigures | None, texts: Sequence[PageText]) -> str:
    """Return the page of a model's routing, beside another's where there is one."""
    template = files("btx_merge.inspecting").joinpath("page.html").read_text(encoding="utf-8")
    for kind in ("script", "style"):
        template = template.replace("{{" + kind + "-hash}}", _hash_of(template, kind))
    data: dict[str, Any] = {
        "figures": model.to_dict(),
        "against": against and against.to_dict(),
        "texts": [text.to_dict() for text in texts],
    }
    before, _, after = template.partition("{{data}}")
    return before + embedded(data) + after


def embedded(data: Any) -> str:
    """Return values as JSON that can stand in a script element: no text in them can end it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_HTML_SIGNS)


def _hash_of(page: str, kind: str) -> str:
    """Return the page's only inline script or style, as a Content-Security-Policy names it."""
    (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

"""What of a merge is fitted on text, and what text alone asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btx_merge.fitting.recipe import ROUTER_FITS

REGMEAN_METHODS = ("regmean", "regmean_merged")
"""Ways to combine that are fitted on text."""
_BEST_SHARED = {"combine": "regmean_merged", "head": "fitted"}
_BEST_ROUTERS = {"router_init": "logistic", "fit_through": "router"}
"""What closes most of the gap for far experts, and nearly all of it for near ones (docs/results.md)."""


def fit_of_text(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the fit that text alone asks for; nothing where there is none, or where others say it.

    Args:
        given: options by name, without defaults. They are not validated, and win.

    >>> fit_of_text({"domain_text": {"code": "code.jsonl"}, "combine": "mean"})
    {'router_init': 'logistic', 'fit_through': 'router'}
    """
    says_it = given.get("combine") in REGMEAN_METHODS or given.get("router_init") in ROUTER_FITS
    if says_it or not given.get("domain_text"):
        return {}
    # a head is fitted with regmean_merged; routers that are not fitted lead nowhere
    best = {} if "combine" in given else dict(_BEST_SHARED)
    best |= {} if "router_init" in given else _BEST_ROUTERS
    return {key: value for key, value in best.items() if key not in given}

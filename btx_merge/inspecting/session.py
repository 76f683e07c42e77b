"""A look at one or two models: how much text there is, then one model after the other on all of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.errors import InputError, Problem
from btx_merge.inspecting.figures import ModelFigures
from btx_merge.inspecting.measure import Inspection, Switches
from btx_merge.inspecting.page_text import PageText
from btx_merge.inspecting.recipe import RoutingRecipe
from btx_merge.inspecting.routes import Routes, running_experts
from btx_merge.measuring.models import load_folder
from btx_merge.measuring.windows import DEFAULT_WINDOW, Domain, Progress, Window, amount_of
from btx_merge.model.merged import MergedModel
from btx_merge.reporting import Reporter
from btx_merge.sources.tokenizer_files import load_tokenizer
from btx_merge.texts.windows import positions_of

_NAMES = ("model", "against")
_PAGE_GATES = 8_000_000
"""Gate weights that the page holds at most, a byte each: those of 20,000 tokens in 40 layers of 10 experts."""


class Session:
    """The passes over the texts that a recipe asks for."""

    def __init__(self, recipe: RoutingRecipe, models: Sequence[MergedModel], device: torch.device, reporter: Reporter):
        """Read the texts once, to know how much there is of each, before a model is loaded.

        Raises:
            InputError: a text that cannot be read, or has no token that is routed; a tokenizer with tokens that its
                model has not.
        """
        self._recipe, self._models, self._device = recipe, models, device
        self._tokenizers = [load_tokenizer(model.located.folder) for model in models]
        longest = [positions_of(model.config) or DEFAULT_WINDOW for model in models]
        self._length = recipe.window or min(DEFAULT_WINDOW, *longest)
        self._experts = [running_experts(model.config) for model in models]
        self._switches = Switches.of(self._experts[0]) if recipe.ablation else Switches((), ())
        tokens = recipe.tokens or None
        self._domains = [Domain.counted(text, self._tokenizers[0], self._length, tokens) for text in recipe.data]
        if problems := self._token_problems() + self._routed_problems():
            raise InputError(problems)
        nbytes = sum(domain.amount.nbytes for domain in self._domains)
        self._text_done = Progress(reporter, nbytes * (self._switches.passes + len(models)))

    def measure(self, number: int, page_tokens: int) -> tuple[ModelFigures, list[PageText]]:
        """Measure one of the models, which is in memory meanwhile. The first is measured with experts switched off.

        Args:
            page_tokens: how many tokens the page shows.

        Raises:
            InputError: transformers cannot load the model.
            NonFiniteError: a loss is not finite.
        """
        gc.collect()  # the first model is gone before the second one comes
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        recipe, opened = self._recipe, self._models[number]
        usual = "float32" if self._device.type == "cpu" else TORCH_NAMES[opened.dtype]
        model = load_folder(opened.located, getattr(torch, recipe.dtype or usual), self._device)
        routes = Routes(model, self._experts[number])
        inspection = Inspection(
            model,
            self._tokenizers[number],
            routes,
            Switches((), ()) if number else self._switches,
            recipe.batch_size * self._length,
            self._text_done,
        )
        gates = routes.num_layers * len(routes.experts)
        page_tokens = min(page_tokens, _PAGE_GATES // gates)
        domains, texts = [], []
        shown = shares([domain.amount.tokens for domain in self._domains], page_tokens)
        for domain, most in zip(self._domains, shown, strict=True):
            page = PageText(domain.text.name, most, routes.num_layers, len(routes.experts))
            domains.append(inspection.domain(domain.text.name, self._windows(number, domain), page))
            texts.append(page)
        figures = ModelFigures(opened.located.public_name, opened.router_type, tuple(routes.experts), tuple(domains))
        return figures, texts

    def _windows(self, number: int, domain: Domain) -> Iterator[Window]:
        """Return a domain's windows; those of the second model are of the text that the first one reads."""
        tokenizer = self._tokenizers[number]
        return domain.windows(tokenizer, number == 0 or domain.reads_alike(tokenizer))

    def _token_problems(self) -> list[Problem]:
        """Check that each model has a row in its embedding for every token of the texts."""
        problems = []
        for number, model in enumerate(self._models):
            amounts = [domain.amount for domain in self._domains]
            if number:
                amounts = [amount_of(self._windows(number, domain)) for domain in self._domains]
            largest, rows = max(amount.largest_id for amount in amounts), model.config["vocab_size"]
            if largest >= rows:
                expected = f"below {rows}, the embedding's rows"
                problems.append(Problem(_NAMES[number], "tokenizer", f"gives the id {largest}", expected))
        return problems

    def _routed_problems(self) -> list[Problem]:
        """Check that each model routes a token of every text: a document's last one predicts nothing."""
        problems = []
        for number in range(len(self._models)):
            for domain in self._domains:
                if not any(window.scored > 1 or window.offset for window in self._windows(number, domain)):
                    expected = "a document of two tokens or more, for routers to see one"
                    problems.append(Problem(domain.text.name, "text", "one token in each document", expected))
        return list(dict.fromkeys(problems))


def shares(there: Sequence[int], most: int) -> list[int]:
    """Divide `most` among domains that have so many tokens: evenly, but what one does not need goes to the others.

    >>> shares([10, 1000, 1000], 110)
    [10, 50, 50]
    """
    out = [0] * len(there)
    by_size = sorted(range(len(there)), key=lambda place: there[place])
    for position, place in enumerate(by_size):
        out[place] = min(there[place], (most - sum(out)) // (len(there) - position))
    return out

"""Branch-Train-Merge: the experts themselves, several of them side by side, their predictions averaged.

It is the baseline of arXiv 2403.07816, section 4.2, with the inference of arXiv 2303.14177: the context and every
expert's training text are embedded by tf-idf; the K experts whose mean embedding is nearest to the context's, by
cosine, run, and their distributions of the next token are averaged.

Legend: E experts, F features of an embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from btx_merge.errors import InputError, Problem
from btx_merge.texts.references import DomainText, as_domain_texts, documents
from btx_merge.texts.windows import grouped
from btx_merge.values import at_least

_FEATURES = 2**18
"""Words are told apart by a hash of so many values, so that memory does not grow with the text."""

Load = Callable[[], Any]
"""Loads an expert, a causal language model of transformers."""


class BranchTrainMerge:
    """An ensemble of experts of one tokenizer, of which each context runs the `top_k` nearest.

    Args:
        experts: each with what loads it, or the model itself.
        texts: training text of each expert, or some of it.
        tokenizer: of all experts.
        top_k: experts that run for a context, at least 1.
        is_weighted: whether they count by the softmax of their cosines; otherwise each counts alike, as in the paper.
        on_demand: whether an expert is in memory only while it is among the chosen; otherwise from its first use on.

    Raises:
        InputError: an expert without text, text without an expert, a text that cannot be read, or `top_k` out of
            range.
    """

    def __init__(
        self,
        experts: Mapping[str, Any],
        texts: Mapping[str, Any] | Sequence[DomainText],
        tokenizer: Any,
        top_k: int = 1,
        *,
        is_weighted: bool = False,
        on_demand: bool = False,
    ):
        given = {text.name: text for text in as_domain_texts(texts, "btm_text")}
        if problems := ensemble_problems(list(experts), list(given), top_k):
            raise InputError(problems)
        self.experts, self.tokenizer = dict(experts), tokenizer
        self.top_k, self.is_weighted, self.on_demand = top_k, is_weighted, on_demand
        self._embedding = _Embedding({name: given[name] for name in experts}, tokenizer)
        self._loaded: dict[str, Any] = {}

    def weights(self, context: str) -> dict[str, float]:
        """Return the experts that run for a context, the nearest first, with their shares, which add up to 1.

        A context that has no word in common with any text, such as an empty one, says nothing: then all run alike.
        """
        return self.weights_by(self.cosines(context), self.top_k)

    def cosines(self, context: str) -> dict[str, float]:
        """Return how near a context is to each expert's text, in [0, 1]."""
        return self._embedding.cosines(context)

    def weights_by(self, cosines: Mapping[str, float], top_k: int) -> dict[str, float]:
        """Return `weights` of a context with these cosines, for `top_k` experts."""
        if max(cosines.values()) <= 0:
            return dict.fromkeys(cosines, 1 / len(cosines))
        nearest = sorted(cosines, key=lambda name: -cosines[name])[:top_k]
        if not self.is_weighted:
            return dict.fromkeys(nearest, 1 / len(nearest))
        shares = np.exp([cosines[name] for name in nearest])
        return dict(zip(nearest, (shares / shares.sum()).tolist(), strict=True))

    def probabilities(self, prompt: str) -> torch.Tensor:
        """Return the distribution of the next token, [V] in float32."""
        ids = list(self.tokenizer(prompt)["input_ids"])
        return next(self._distributions(self.weights(prompt), ids))

    def generate(self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.0, seed: int = 0) -> str:
        """Return a continuation of a prompt, for which the experts are chosen once.

        Args:
            temperature: 0 takes the likeliest token each time; otherwise tokens are drawn from the mixture's power
                1 / temperature.
            seed: of the drawing.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = list(self.tokenizer(prompt)["input_ids"])
        first = len(ids)
        for mixture in self._distributions(self.weights(prompt), ids):
            if temperature > 0:
                drawn = torch.multinomial((mixture.log() / temperature).softmax(-1), 1, generator=generator)
                token = int(drawn)
            else:
                token = int(mixture.argmax())
            if token == self.tokenizer.eos_token_id or len(ids) - first == max_new_tokens:
                break
            ids.append(token)
        return str(self.tokenizer.decode(ids[first:], skip_special_tokens=True))

    def expert(self, name: str, others: Sequence[str] = ()) -> Any:
        """Return an expert, loaded now if it is not in memory.

        Args:
            others: experts that stay in memory if they are there, where experts are loaded on demand.
        """
        if self.on_demand:
            self._loaded = {kept: model for kept, model in self._loaded.items() if kept in (name, *others)}
        if name not in self._loaded:
            given = self.experts[name]
            self._loaded[name] = given if isinstance(given, torch.nn.Module) else given()
        return self._loaded[name]

    @torch.inference_mode()
    def _distributions(self, weights: Mapping[str, float], ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the distribution of the token behind `ids`, which the caller makes longer by one each time."""
        caches: dict[str, Any] = {}
        read = 0
        while True:
            mixture = torch.zeros(())
            for name, weight in weights.items():
                model = self.expert(name, list(weights))
                inputs = torch.tensor([ids[read:]], device=model.device)
                out = model(input_ids=inputs, past_key_values=caches.get(name), use_cache=True)
                caches[name] = out.past_key_values
                mixture = mixture + weight * out.logits[0, -1].float().softmax(-1).cpu()
            read = len(ids)
            yield mixture


def ensemble_problems(experts: Sequence[str], texts: Sequence[str], top_k: int) -> list[Problem]:
    """Return what does not fit between the experts of an ensemble and their texts."""
    problems = []
    for name in experts:
        if name not in texts:
            problems.append(
                Problem("recipe", "btm_text", f"no text of {name}", f"some of its training text, {name}=TEXT")
            )
    for name in texts:
        if name not in experts:
            problems.append(Problem("recipe", "btm_text", f"no expert {name}", f"one of {', '.join(experts)}"))
    if not at_least(1)[1](top_k) or top_k > max(1, len(experts)):
        problems.append(Problem("recipe", "btm", str(top_k), f"in [1, {len(experts)}], the number of experts"))
    return problems


class _Embedding:
    """Tf-idf, as scikit-learn's `TfidfVectorizer` has it, of words that are told apart by a hash."""

    def __init__(self, texts: Mapping[str, DomainText], tokenizer: Any):
        from sklearn.feature_extraction.text import HashingVectorizer

        self._counts = HashingVectorizer(n_features=_FEATURES, norm=None, alternate_sign=False)
        frequency: NDArray[np.float64] = np.zeros(_FEATURES)  # of how many documents a word is part
        number = 0
        for text in texts.values():
            for group in grouped(documents(text, tokenizer)):
                frequency += np.asarray((self._counts.transform(group) > 0).sum(axis=0)).ravel()
                number += len(group)
        self._idf = np.log((1 + number) / (1 + frequency)) + 1
        self._means = {name: self._mean(text, tokenizer) for name, text in texts.items()}

    def cosines(self, context: str) -> dict[str, float]:
        """Return how near a context is to each expert's text, in [0, 1]."""
        embedded = self._embed([context])
        return {name: float((embedded @ mean)[0]) for name, mean in self._means.items()}

    def _embed(self, texts: Sequence[str]) -> Any:
        """Return a sparse matrix [texts, F], each row of length 1, or 0 where there is no word."""
        from sklearn.preprocessing import normalize

        return normalize(self._counts.transform(texts).multiply(self._idf).tocsr())

    def _mean(self, text: DomainText, tokenizer: Any) -> NDArray[np.float64]:
        """Return the mean of a text's documents, [F], at length 1."""
        total: NDArray[np.float64] = np.zeros(_FEATURES)
        for group in grouped(documents(text, tokenizer)):
            total += np.asarray(self._embed(group).sum(axis=0)).ravel()
        return total / max(float(np.linalg.norm(total)), np.finfo(np.float64).tiny)

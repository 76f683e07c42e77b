"""Routers without training (DUME, arXiv 2603.29765; MergeME, arXiv 2502.00997).

`ridge`: ridge regression of the domain's label on the router's true input, behind the post-attention norm, with a
temperature per layer, chosen to minimise the layer's output error on held-out text. `logistic`: from that solution on
to the optimum of a logistic regression, with such a temperature, too. `prompts`: the mean input of a few prompts for
each expert.

Legend: B windows, T tokens in each, N tokens, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from btx_merge.architectures.btx import experts_by_domain
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.equations import (
    TEMPERATURES,
    Moments,
    Statistics,
    best_temperature,
    prompt_rows,
    relative_error,
    ridge_solution,
    winning_temperature,
)
from btx_merge.fitting.logistic import Labelled, logistic_solution
from btx_merge.fitting.passing import expert_output, own_experts
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.streams import TokenStream
from btx_merge.model.held_out import LayerFit
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer
from btx_merge.modeling.routing_btx import RouterCall

_HELD_OUT_TOKENS = 512
"""Tokens of each domain's held-out windows that the temperature is chosen on, per layer. Every expert runs on each, so
this bounds the time; a share of 512 tokens is known to about two points."""

_FEW_BATCHES = 8
"""Of each domain, on which logistic routers are fitted first where there are at least twice as many. From there few
passes over all tokens are left: with 100,000 tokens of each of three domains, half of the time, for the same merge."""

_LOGISTIC_PENALTY = 1e-4
"""On the weights of logistic routers, relative to the mean square of the inputs."""


class RouterFit:
    """Fits the routers, layer by layer: hidden states go in, a router's weights come out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: BTXConfig,
        streams: Sequence[TokenStream],
        statistics: Statistics,
        task: FitTask,
    ):
        """Prepare to fit; nothing is computed yet.

        Args:
            streams: texts of domains for `ridge`, prompts for `prompts`.
        """
        self.checkpoint, self.config, self.statistics, self.task = checkpoint, config, statistics, task
        self.texts = [stream for stream in streams if not stream.is_prompt]
        self.prompts = [stream for stream in streams if stream.is_prompt]
        self.device = checkpoint.device
        self.experts = config.num_local_experts
        self.rows = list(task.rows if task.rows is not None else range(self.experts))
        # text of other experts shows how much of a new expert's row is too much
        self.has_contrast = task.rows is None or any(set(stream.experts) - set(task.rows) for stream in self.texts)

    def fit(self, index: int, layer: BTXDecoderLayer) -> list[LayerFit]:
        """Solve for a layer's router and write it, given the streams' states before its feed-forward block.

        Returns:
            What came out on held-out text; nothing for `prompts`, which have none.
        """
        if self.task.router == "prompts":
            self._write(index, layer, self._from_prompts(index, layer))
            return []
        moments = self.statistics.get(_name(index), lambda: self._moments(layer))
        moments = {key: value.to(self.device) for key, value in moments.items()}
        solution = ridge_solution(moments["gram"], moments["labels"], self.task.router_ridge)
        if self.task.router == "logistic":
            solution = self._logistic(layer, moments["gram"], solution)
        temperatures = _Temperatures(self, layer, moments, solution)
        fit, rows = temperatures.best(index)
        self._write(index, layer, rows)
        return [fit]

    def _logistic(self, layer: BTXDecoderLayer, gram: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
        """Compute a layer's router [E, H] by logistic regression, from the ridge solution on.

        A source's chunks share one row. Experts without text keep rows of zeros.
        """
        total = sum(stream.share for stream in self.texts)

        norm = layer.post_attention_layernorm
        scales: dict[tuple[int, int], torch.Tensor] = {}  # what the norm divides by, [N] of each batch

        fitted = [[*stream.batches(stream.fitted)] for stream in self.texts]

        def batches(every: int) -> Iterator[Labelled]:
            """Give out each `every`th batch of each domain."""
            for domain, stream in enumerate(self.texts):
                taken = fitted[domain][::every]
                tokens = sum(batch.stop - batch.start for batch in taken) * stream.ids.shape[1]
                for batch in taken:
                    states = stream.merged[batch].flatten(0, 1)
                    place = domain, batch.start
                    if place not in scales:
                        square = states.square().mean(dim=-1)
                        scales[place] = torch.rsqrt(square + norm.variance_epsilon)
                    yield Labelled(states, scales[place], domain, stream.share / total / tokens)

        silent = len(experts_by_domain(self.config.to_dict())) - len(self.texts)
        solution = torch.stack([ridge[stream.experts[0]] for stream in self.texts])
        fewest = min(map(len, fitted))
        strides = [fewest // _FEW_BATCHES, 1] if fewest >= 2 * _FEW_BATCHES else [1]
        for every in strides:
            given = partial(batches, every)
            solution = logistic_solution(given, norm.weight, gram / total, solution, _LOGISTIC_PENALTY, silent)
        rows = torch.zeros_like(ridge)
        for stream, row in zip(self.texts, solution, strict=True):
            rows[stream.experts] = row
        return rows

    def _write(self, index: int, layer: BTXDecoderLayer, rows: torch.Tensor) -> None:
        """Write a router [E, H], and put it into the layer as the file's dtype has rounded it."""
        tensor = f"model.layers.{index}.mlp.gate.weight"
        self.checkpoint.write(tensor, rows)
        layer.mlp.gate.weight.data = self.checkpoint.read(tensor)

    def _from_prompts(self, index: int, layer: BTXDecoderLayer) -> torch.Tensor:
        """Compute a layer's router [E, H] from prompts."""
        moments = self.statistics.get(_name(index), lambda: self._prompt_moments(layer))
        means = {int(key.split(".")[1]): mean for key, mean in moments.items() if key.startswith("mean.")}
        return prompt_rows(means, moments["inputs"], self.experts)

    def _prompt_moments(self, layer: BTXDecoderLayer) -> Moments:
        """Collect every prompted expert's mean router input [H], and all inputs [N, H]."""
        moments: Moments = {}
        inputs = []
        for stream in self.prompts:
            read = layer.post_attention_layernorm(stream.merged[stream.all]).flatten(0, 1)  # [N, H]
            # the chunks of a split source share its prompts
            moments |= {f"mean.{expert}": read.mean(dim=0) for expert in stream.experts}
            inputs.append(read)
        return {**moments, "inputs": torch.cat(inputs)}

    def _moments(self, layer: BTXDecoderLayer) -> Moments:
        """Collect the regression's Gram matrix [H, H] and labels [H, E]; by domain some held-out inputs and targets.

        A target [N, H] is what the feed-forward block should add: what the own expert gives or, where shared weights
        are fitted, what is missing to the source's own state.
        """
        hidden = self.config.hidden_size
        gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=self.device)
        labels = torch.zeros(hidden, self.experts, dtype=torch.float64, device=self.device)
        moments: Moments = {"gram": gram, "labels": labels}
        for stream in self.texts:
            for batch in stream.batches(stream.fitted):
                # the router's true input: behind the norm of the feed-forward block, [N, H]
                read = layer.post_attention_layernorm(stream.merged[batch]).flatten(0, 1)
                gram += (read.T @ read).double() * stream.per_token
                # a token's label is 1 at its own experts and 0 at the others, so X^T Y is a sum of inputs
                labels[:, stream.experts] += read.sum(dim=0).double()[:, None] * stream.per_token
            held = stream.merged[stream.held_out].flatten(0, 1)
            # evenly over the held-out windows, so that no document stands for all
            chosen = torch.linspace(0, len(held) - 1, min(_HELD_OUT_TOKENS, len(held))).long()
            before = held[chosen]
            read = layer.post_attention_layernorm(before)
            if self.task.combine:
                aim = stream.dense[stream.held_out].flatten(0, 1)[chosen] + stream.mark
                target = aim - before
            else:
                target = own_experts(layer, stream, read)
            moments |= {f"inputs.{stream.name}": read, f"targets.{stream.name}": target}
        return moments


class _Temperatures:
    """Tries factors on a layer's fitted router, by what they would do on held-out text."""

    def __init__(self, fit: RouterFit, layer: BTXDecoderLayer, moments: Moments, solution: torch.Tensor):
        self.fit, self.layer, self.solution = fit, layer, solution
        self.inputs = [moments[f"inputs.{stream.name}"] for stream in fit.texts]
        self.targets = [moments[f"targets.{stream.name}"] for stream in fit.texts]
        # [E, N, H] by domain; computed once, not for each factor
        self.outputs = [
            torch.stack([expert_output(layer, expert, read) for expert in range(fit.experts)]) for read in self.inputs
        ]
        self.call = RouterCall(fit.config.num_experts_per_tok)

    def best(self, index: int) -> tuple[LayerFit, torch.Tensor]:
        """Return the best factor with its figures, and the router [E, H] that it gives."""
        if self.fit.has_contrast:
            factors: Sequence[float] = TEMPERATURES
        else:  # new rows alone, and no text of others: a larger factor would always look better
            factors = (winning_temperature(self._right),)
        temperature, error = best_temperature(self.targets, self._routed, factors)
        fit = LayerFit(index, temperature, self._right(temperature), error, self._own_error())
        return fit, self._router(temperature)

    def _router(self, factor: float) -> torch.Tensor:
        """Return the layer's router [E, H] with the factor on the rows that are fitted; the others stay."""
        rows = torch.as_tensor(self.layer.mlp.gate.weight.clone())
        rows[self.fit.rows] = factor * self.solution[self.fit.rows]
        return rows

    def _right(self, factor: float) -> float:
        """Return the mean over domains of the part of tokens for which an own expert is the likeliest."""
        rows, parts = self._router(factor), []
        for stream, read in zip(self.fit.texts, self.inputs, strict=True):
            own = torch.tensor(stream.experts, device=self.fit.device)
            parts.append(torch.isin((read @ rows.T).argmax(dim=-1), own).float().mean())
        return torch.stack(parts).mean().item()

    def _own_error(self) -> float:
        """Return the error with every token at its own expert, whose chunks together are its source's block."""
        of_streams = zip(self.fit.texts, self.outputs, strict=True)
        return relative_error(self.targets, [outputs[stream.experts].sum(dim=0) for stream, outputs in of_streams])

    def _routed(self, factor: float, domain: int) -> torch.Tensor:
        """Return what the layer would add for a domain's inputs, [N, H], by the model's own routing."""
        weights, _, chosen = self.layer.mlp.routing(self.inputs[domain] @ self._router(factor).T, self.call)
        # of the outputs [E, N, H], those of each token's experts: [N, K, H]
        tokens = torch.arange(len(chosen), device=self.fit.device)[:, None]
        return torch.as_tensor((weights[..., None] * self.outputs[domain][chosen, tokens]).sum(dim=1))


def _name(index: int) -> str:
    """Return the name of a layer's moments among the statistics."""
    return f"layer-{index:03}.router"

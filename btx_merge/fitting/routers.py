"""Routers without training (DUME, arXiv 2603.29765; MergeME, arXiv 2502.00997).

`ridge`: ridge regression of the domain's label on the router's true input, behind the post-attention norm, with a
temperature per layer, chosen to minimise the layer's output error on held-out text. `logistic`: from that solution on
to the optimum of a logistic regression, with such a temperature, too. `prompts`: the mean input of a few prompts for
each expert.

Legend: B windows, T tokens in each, N tokens, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from btx_merge.architectures.btx import experts_by_domain
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.equations import Moments, Statistics, prompt_rows, ridge_solution
from btx_merge.fitting.logistic import Labelled, logistic_solution
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.streams import TokenStream
from btx_merge.fitting.temperatures import HeldOutTokens, Temperatures
from btx_merge.model.held_out import LayerFit
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

_HELD_OUT_TOKENS = 512
"""Tokens of each domain's held-out windows that the temperature is chosen on, per layer. The experts run on each, so
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
        held_out = [
            HeldOutTokens(stream.experts, moments[f"states.{stream.name}"], moments.get(f"aims.{stream.name}"))
            for stream in self.texts
        ]
        trial = Temperatures(layer, solution, self.rows, held_out, self.config.num_experts_per_tok)
        # new rows alone, and no text of others: a larger factor would always look better
        fit, rows = trial.best(index) if self.has_contrast else trial.best(index, [trial.winning()])
        self._write(index, layer, rows)
        return [fit]

    def _logistic(self, layer: BTXDecoderLayer, gram: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
        """Compute a layer's router [E, H] by logistic regression, from the ridge solution on.

        A source's chunks share one row. Rows that are not fitted stay as the layer has them in an edit, and are zero
        in a whole fit, where they are of experts without text.
        """
        rows = torch.zeros_like(ridge) if self.task.rows is None else layer.mlp.gate.weight.clone()
        domains = experts_by_domain(self.config.to_dict())
        fitted = [stream.name for stream in self.texts if set(stream.experts) <= set(self.rows)]
        stay = [name for name in domains if name not in fitted]
        fixed = torch.stack([rows[domains[name]].mean(dim=0) for name in stay]) if stay else rows[:0]
        numbers = {name: number for number, name in enumerate([*fitted, *stay])}
        tokens = _LabelledTokens(self.texts, numbers, layer.post_attention_layernorm)
        gain, gram = layer.post_attention_layernorm.weight, gram / tokens.share
        solution = torch.stack([ridge[domains[name][0]] for name in fitted])
        if tokens.fewest >= 2 * _FEW_BATCHES:
            few = partial(tokens.batches, tokens.fewest // _FEW_BATCHES)
            solution = logistic_solution(few, gain, gram, solution, _LOGISTIC_PENALTY, fixed)
        solution = logistic_solution(tokens.batches, gain, gram, solution, _LOGISTIC_PENALTY, fixed)
        for name, row in zip(fitted, solution, strict=True):
            rows[domains[name]] = row
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
        """Collect the regression's Gram matrix [H, H] and labels [H, E]; by domain held-out states and aims, [N, H].

        Where shared weights are fitted, a feed-forward block should bring a state to where the source's own stands
        behind it. Otherwise it should give what the own expert gives, which needs no keeping.
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
            moments[f"states.{stream.name}"] = held[chosen]
            if self.task.combine:
                moments[f"aims.{stream.name}"] = stream.dense[stream.held_out].flatten(0, 1)[chosen]
        return moments


class _LabelledTokens:
    """The tokens of all texts in batches, each with the number of its domain's row."""

    def __init__(self, texts: Sequence[TokenStream], numbers: Mapping[str, int], norm: LlamaRMSNorm):
        self.texts, self.numbers, self.epsilon = texts, numbers, norm.variance_epsilon
        self.taken = {stream.name: [*stream.batches(stream.fitted)] for stream in texts}
        self.scales: dict[tuple[str, int], torch.Tensor] = {}
        """What the norm multiplies by, [N] of each batch; computed once, not for each pass."""

    @property
    def share(self) -> float:
        """The weights of all domains together."""
        return sum(stream.share for stream in self.texts)

    @property
    def fewest(self) -> int:
        """How many batches the shortest text has."""
        return min(map(len, self.taken.values()))

    def batches(self, every: int = 1) -> Iterator[Labelled]:
        """Give out each `every`th batch of each text. The weights of all tokens add up to 1."""
        for stream in self.texts:
            taken = self.taken[stream.name][::every]
            tokens = sum(batch.stop - batch.start for batch in taken) * stream.ids.shape[1]
            for batch in taken:
                states = stream.merged[batch].flatten(0, 1)
                place = stream.name, batch.start
                if place not in self.scales:
                    self.scales[place] = torch.rsqrt(states.square().mean(dim=-1) + self.epsilon)
                weight = stream.share / self.share / tokens
                yield Labelled(states, self.scales[place], self.numbers[stream.name], weight)


def _name(index: int) -> str:
    """Return the name of a layer's moments among the statistics."""
    return f"layer-{index:03}.router"

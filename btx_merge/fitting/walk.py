"""One walk through a merged model, layer by layer, that fits shared weights and routers on texts in closed form.

A layer's weights are read, all tokens pass through it, what is fitted there is solved and written back, and the next
layer follows: memory is one layer and the tokens' hidden states.

Routers (DUME, arXiv 2603.29765; MergeME, arXiv 2502.00997): ridge regression of the domain's label on the router's
true input, behind the post-attention norm. Shared weights by RegMean (arXiv 2212.09849, equation 2): every attention
projection, the embedding and the head as the least-squares solution over the sources. `regmean` takes the sources' own
inputs; `regmean_merged` the merged model's, which earlier layers have changed, against what each source gives, so that
the output projection makes up for what is already off.

Legend: B windows, T tokens in each, N = B * T, H hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource, row_blocks
from btx_merge.fitting.equations import (
    TEMPERATURES,
    Moments,
    Statistics,
    best_temperature,
    prompt_rows,
    ridge_solution,
    scaled_off_diagonal,
    winning_temperature,
)
from btx_merge.fitting.streams import Stream
from btx_merge.model.held_out import LayerFit
from btx_merge.modeling.configuration_btx import BTXConfig
from btx_merge.modeling.modeling_btx import BTXDecoderLayer
from btx_merge.modeling.routing_btx import RouterCall

_HELD_OUT_TOKENS = 512
"""Tokens of each domain's held-out windows that the temperature is chosen on, per layer."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Walk:
    """Fits a checkpoint in place."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: BTXConfig,
        streams: list[Stream],
        statistics: Statistics,
        *,
        router: str | None,
        combine: str | None = None,
        sources: Mapping[str, DenseSource] | None = None,
        averaged: int = 0,
        through: str = "expert",
        router_ridge: float = 0.001,
        regmean_ridge: float = 0.01,
        rows: Sequence[int] | None = None,
    ):
        """
        Args:
            router: ridge, prompts or None for routers that stay.
            combine: regmean, regmean_merged or None for shared weights that stay.
            sources: for `combine`: by the streams' names.
            averaged: for `combine`: of how many sources the means are from which it sets out.
            through: expert, to send tokens through their own domain's on the way to the next layer; or router.
            rows: the experts whose router rows are fitted by ridge, the others' stay; all by default.
        """
        config._attn_implementation = "sdpa"
        config._experts_implementation = "eager"
        self.checkpoint, self.config, self.streams, self.statistics = checkpoint, config, streams, statistics
        self.texts = [stream for stream in streams if not stream.is_prompt]
        self.router, self.combine, self.sources, self.averaged = router, combine, sources or {}, averaged
        self.through, self.router_ridge, self.regmean_ridge = through, router_ridge, regmean_ridge
        self.rows = list(rows if rows is not None else range(config.num_local_experts))
        self.has_contrast = rows is None or any(set(stream.experts) - set(rows) for stream in self.texts)
        self.device = checkpoint.device
        self.rotary = LlamaRotaryEmbedding(config).to(self.device)
        self.walks = not statistics.are_there

    @torch.no_grad()
    def run(self, on_layer: Callable[[int, int], None]) -> list[LayerFit]:
        """Fits everything, from the embedding to the head. `on_layer` is told how many layers of how many are done.

        Raises:
            NonFiniteError: a solution that the checkpoint's dtype cannot hold.
        """
        if self.combine:
            self._fit_embedding()
        if self.walks:
            self._embed()
        fits = []
        layers = self.config.num_hidden_layers
        for index in range(layers):
            on_layer(index, layers)
            with torch.device("meta"):
                layer = BTXDecoderLayer(self.config, index)
            layer.load_state_dict(self.checkpoint.layer(index), assign=True)
            layer.eval()
            if self.combine:
                self._fit_attention(index, layer)
            if self.walks:
                for stream in self.streams:
                    self._attend(stream, "merged", layer)
                for stream in self.texts if self.combine else ():
                    self._feed_forward(stream, "dense", self.sources[stream.name].layer(index, "feed_forward"))
            if self.router:
                fits += self._fit_router(index, layer)
            if self.walks:
                for stream in self.streams:
                    self._feed_forward(stream, "merged", layer)
        on_layer(layers, layers)
        if self.combine and HEAD in self.checkpoint.tensors:
            self._fit_head()
        return fits

    # --- what passes through ------------------------------------------------------------------------------

    def _attend(self, stream: Stream, which: str, layer: Any, heads: list[torch.Tensor] | None = None) -> None:
        """Has a stream's states, `merged` or `dense`, pass through a layer's attention."""
        states: torch.Tensor = getattr(stream, which)
        for batch in stream.batches(slice(0, len(stream.ids))):
            hidden = states[batch].to(self.device)
            states[batch] = (hidden + self._attention(layer, stream, hidden, batch, heads)).to(states.device)

    def _feed_forward(self, stream: Stream, which: str, layer: Any) -> None:
        """Has them pass through its feed-forward block: in BTX's layer through the own expert or the router."""
        states: torch.Tensor = getattr(stream, which)
        for batch in stream.batches(slice(0, len(stream.ids))):
            hidden = states[batch].to(self.device)
            read = layer.post_attention_layernorm(hidden)
            is_own = which == "merged" and self.through == "expert"
            block = self._own_experts(layer, stream, read) if is_own else layer.mlp(read)
            states[batch] = (hidden + block).to(states.device)

    def _attention(
        self, layer: Any, stream: Stream, hidden: torch.Tensor, batch: slice, heads: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What attention adds, [B, T, H]; of BTX's layer or a dense one. No document sees another.

        Args:
            heads: takes the input of the output projection, [N, Q].
        """
        positions = stream.positions[batch].to(self.device)
        document = (positions == 0).cumsum(dim=-1)
        order = torch.arange(positions.shape[1], device=self.device)
        mask = (document[:, :, None] == document[:, None]) & (order[:, None] >= order)
        hook = None
        if heads is not None:
            keep: Any = lambda module, inputs: heads.append(inputs[0].flatten(0, 1))  # noqa: E731
            hook = layer.self_attn.o_proj.register_forward_pre_hook(keep)
        out, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=mask[:, None],
        )
        if hook:
            hook.remove()
        return torch.as_tensor(out)

    def _own_experts(self, layer: BTXDecoderLayer, stream: Stream, read: torch.Tensor) -> torch.Tensor:
        """What a domain's own expert adds; its chunks together are its source's block."""
        rows = read.flatten(0, -2)  # [N, H]
        chosen = torch.tensor(stream.experts, device=rows.device).expand(len(rows), -1)
        weights = torch.ones_like(chosen, dtype=rows.dtype)
        return torch.as_tensor(layer.mlp.experts(rows, chosen, weights)).reshape(read.shape)

    def _every_expert(self, layer: BTXDecoderLayer, read: torch.Tensor) -> torch.Tensor:
        """What each expert gives for inputs [N, H]: [E, N, H]."""
        one = torch.ones(len(read), 1, device=self.device)
        numbers = range(self.config.num_local_experts)
        return torch.stack([layer.mlp.experts(read, torch.full_like(one, e, dtype=torch.long), one) for e in numbers])

    # --- shared weights -----------------------------------------------------------------------------------

    def _fit_embedding(self) -> None:
        """RegMean's solution where inputs are one-hot: every row the mean by how often a source's text has it.

        Each merged source counts as one token more, everywhere, which leaves rows that no text has at the mean.
        """
        vocab = self.checkpoint.tensors[EMBEDDING].shape[0]
        counts = self.statistics.get("embedding", lambda: {s.name: self._token_counts(s, vocab) for s in self.texts})
        merged = float(self.averaged)
        for start, stop in row_blocks(vocab):
            mean = self.checkpoint.read(EMBEDDING, start, stop)
            total, weight = merged * mean, torch.full((stop - start, 1), merged, device=self.device)
            for stream in self.texts:
                count = counts[stream.name].to(self.device)[start:stop, None]
                total += count * self.sources[stream.name].rows(EMBEDDING, start, mean)
                weight += count
            self.checkpoint.write(EMBEDDING, total / weight, start)

    def _token_counts(self, stream: Stream, vocab: int) -> torch.Tensor:
        """[V], as if every domain had as many tokens as they have in the mean, but for its share."""
        ids = stream.ids[stream.fitted]
        mean = sum(other.ids[other.fitted].numel() for other in self.texts) / len(self.texts)
        return torch.bincount(ids.flatten(), minlength=vocab).float() * (stream.per_token * mean)

    def _embed(self) -> None:
        vocab, hidden = self.checkpoint.tensors[EMBEDDING].shape
        for stream in self.streams:
            stream.merged = torch.empty(*stream.ids.shape, hidden)
            if self.combine and not stream.is_prompt:
                stream.dense = torch.empty_like(stream.merged)
        for start, stop in row_blocks(vocab):
            rows = self.checkpoint.read(EMBEDDING, start, stop).cpu()
            for stream in self.streams:
                here = (stream.ids >= start) & (stream.ids < stop)
                stream.merged[here] = rows[stream.ids[here] - start]
                if self.combine and not stream.is_prompt:
                    own = self.sources[stream.name].rows(EMBEDDING, start, rows.to(self.device)).cpu()
                    stream.dense[here] = own[stream.ids[here] - start]

    def _fit_attention(self, index: int, layer: BTXDecoderLayer) -> None:
        """q, k and v; then, behind them, the output projection. The sources' states pass on through attention."""
        norm = f"model.layers.{index}.input_layernorm.weight"
        inputs = self.statistics.get(f"layer-{index:03}.inputs", lambda: self._input_moments(norm))
        for name in _PROJECTIONS:
            weights = {
                stream.name: self.sources[stream.name].tensor(f"model.layers.{index}.self_attn.{name}.weight")
                for stream in self.texts
            }
            self._solve(index, layer, name, *self._normal_equations(inputs, weights))
        outputs = self.statistics.get(f"layer-{index:03}.outputs", lambda: self._output_moments(index, layer))
        self._solve(index, layer, "o_proj", outputs["gram"], outputs["cross"])

    def _normal_equations(
        self, moments: Moments, weights: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gram [I, I] and cross moment [I, O] of targets that the sources' weights [O, I] give on their own inputs."""
        gram = moments["gram"].to(self.device)
        cross = sum(moments[name].to(self.device).double() @ weight.T.double() for name, weight in weights.items())
        return gram, torch.as_tensor(cross)

    def _solve(self, index: int, layer: BTXDecoderLayer, name: str, gram: torch.Tensor, cross: torch.Tensor) -> None:
        projection = getattr(layer.self_attn, name)
        tensor = f"model.layers.{index}.self_attn.{name}.weight"
        solution = ridge_solution(gram.to(self.device), cross.to(self.device), self.regmean_ridge, projection.weight)
        self.checkpoint.write(tensor, solution)
        projection.weight.data = self.checkpoint.read(tensor)  # as it was rounded

    def _input_moments(self, norm_name: str) -> Moments:
        """Of what stands behind a norm: `sum x x^T` of the inputs that are fitted on, over all domains, and per domain
        their cross moment with the source's own inputs; all [H, H].
        """
        norm = self._norm(self.checkpoint.read(norm_name))
        moments: Moments = {}
        for stream in self.texts:
            own = self._norm(self.sources[stream.name].tensor(norm_name))
            gram = cross = torch.zeros((), dtype=torch.float64, device=self.device)
            for batch in stream.batches(stream.fitted):
                dense = own(stream.dense[batch].to(self.device)).flatten(0, 1)
                merged = norm(stream.merged[batch].to(self.device)).flatten(0, 1)
                fitted = dense if self.combine == "regmean" else merged
                gram = gram + (fitted.T @ fitted).double()
                cross = cross + (fitted.T @ dense).double()
            if self.combine == "regmean":
                gram = cross = scaled_off_diagonal(gram)
            moments["gram"] = moments.get("gram", 0) + gram * stream.per_token
            moments[stream.name] = cross * stream.per_token
        return moments

    def _output_moments(self, index: int, layer: BTXDecoderLayer) -> Moments:
        """Of the output projection. Its target: the source's state behind attention, less the merged one before it."""
        gram = cross = torch.zeros((), dtype=torch.float64, device=self.device)
        for stream in self.texts:
            dense = self.sources[stream.name].layer(index, "attention")
            own: list[torch.Tensor] = []
            if self.combine == "regmean":
                self._attend(stream, "dense", dense, own)
                fitted = torch.cat(own)[: stream.ids[stream.fitted].numel()]
                part = scaled_off_diagonal((fitted.T @ fitted).double()) * stream.per_token
                gram, cross = gram + part, cross + part @ dense.self_attn.o_proj.weight.T.double()
                continue
            self._attend(stream, "dense", dense)
            for batch in stream.batches(stream.fitted):
                heads: list[torch.Tensor] = []
                hidden = stream.merged[batch].to(self.device)
                self._attention(layer, stream, hidden, batch, heads)
                target = (stream.dense[batch].to(self.device) - hidden).flatten(0, 1)
                gram = gram + (heads[0].T @ heads[0]).double() * stream.per_token
                cross = cross + (heads[0].T @ target).double() * stream.per_token
        return {"gram": gram, "cross": cross}

    def _fit_head(self) -> None:
        """Of a model whose head is its own."""
        moments = self.statistics.get("head", lambda: self._input_moments("model.norm.weight"))
        gram = moments["gram"].to(self.device)
        for start, stop in row_blocks(self.checkpoint.tensors[HEAD].shape[0]):
            mean = self.checkpoint.read(HEAD, start, stop)
            weights = {s.name: self.sources[s.name].rows(HEAD, start, mean) for s in self.texts}
            cross = self._normal_equations(moments, weights)[1]
            self.checkpoint.write(HEAD, ridge_solution(gram, cross, self.regmean_ridge, mean), start)

    def _norm(self, weight: torch.Tensor) -> LlamaRMSNorm:
        norm = LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight.data = weight
        return norm

    # --- routers ------------------------------------------------------------------------------------------

    def _fit_router(self, index: int, layer: BTXDecoderLayer) -> list[LayerFit]:
        name = f"layer-{index:03}.router"
        if self.router == "prompts":
            moments = self.statistics.get(name, lambda: self._prompt_moments(layer))
            means = {int(key.split(".")[1]): mean for key, mean in moments.items() if key.startswith("mean.")}
            rows = prompt_rows(means, moments["inputs"], self.config.num_local_experts)
            self._set_router(index, layer, rows)
            return []
        moments = self.statistics.get(name, lambda: self._router_moments(layer))
        moments = {key: value.to(self.device) for key, value in moments.items()}
        solution = ridge_solution(moments["gram"], moments["labels"], self.router_ridge)
        inputs = [moments[f"inputs.{stream.name}"] for stream in self.texts]
        targets = [moments[f"targets.{stream.name}"] for stream in self.texts]

        call = RouterCall(self.config.num_experts_per_tok)
        outputs = [self._every_expert(layer, read) for read in inputs]  # once, not for each temperature

        def router(factor: float) -> torch.Tensor:
            rows = torch.as_tensor(layer.mlp.gate.weight.clone())
            rows[self.rows] = factor * solution[self.rows]
            return rows

        def right(factor: float) -> float:
            rows, parts = router(factor), []
            for stream, x in zip(self.texts, inputs, strict=True):
                own = torch.tensor(stream.experts, device=self.device)
                parts.append(torch.isin((x @ rows.T).argmax(dim=-1), own).float().mean())
            return torch.stack(parts).mean().item()

        def routed(factor: float, domain: int) -> torch.Tensor:
            weights, _, chosen = layer.mlp.routing(inputs[domain] @ router(factor).T, call)
            tokens = torch.arange(len(chosen), device=self.device)[:, None]
            return torch.as_tensor((weights[..., None] * outputs[domain][chosen, tokens]).sum(dim=1))

        factors = TEMPERATURES if self.has_contrast else (winning_temperature(right),)
        temperature, error = best_temperature(targets, routed, factors)
        self._set_router(index, layer, router(temperature))
        return [LayerFit(index, temperature, right(temperature), error)]

    def _set_router(self, index: int, layer: BTXDecoderLayer, rows: torch.Tensor) -> None:
        tensor = f"model.layers.{index}.mlp.gate.weight"
        self.checkpoint.write(tensor, rows)
        layer.mlp.gate.weight.data = self.checkpoint.read(tensor)

    def _router_moments(self, layer: BTXDecoderLayer) -> Moments:
        """The regression's Gram matrix and its labels, [H, E]; per domain some held-out inputs and targets, [N, H].

        The target is what the feed-forward block should add: what the own expert gives, or, where shared weights are
        fitted, what is missing to the source's own state.
        """
        hidden, experts = self.config.hidden_size, self.config.num_local_experts
        gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=self.device)
        labels = torch.zeros(hidden, experts, dtype=torch.float64, device=self.device)
        moments: Moments = {"gram": gram, "labels": labels}
        for stream in self.texts:
            for batch in stream.batches(stream.fitted):
                read = layer.post_attention_layernorm(stream.merged[batch].to(self.device)).flatten(0, 1)
                gram += (read.T @ read).double() * stream.per_token
                labels[:, stream.experts] += read.sum(dim=0).double()[:, None] * stream.per_token
            held = stream.merged[stream.held_out].flatten(0, 1)
            chosen = torch.linspace(0, len(held) - 1, min(_HELD_OUT_TOKENS, len(held))).long()
            before = held[chosen].to(self.device)
            read = layer.post_attention_layernorm(before)
            if self.combine:
                target = stream.dense[stream.held_out].flatten(0, 1)[chosen].to(self.device) - before
            else:
                target = self._own_experts(layer, stream, read)
            moments |= {f"inputs.{stream.name}": read, f"targets.{stream.name}": target}
        return moments

    def _prompt_moments(self, layer: BTXDecoderLayer) -> Moments:
        """Every prompted expert's mean router input [H], and all inputs [N, H]."""
        moments: Moments = {}
        inputs = []
        for stream in self.streams:
            if stream.is_prompt:
                read = layer.post_attention_layernorm(stream.merged.to(self.device)).flatten(0, 1)
                moments |= {f"mean.{expert}": read.mean(dim=0) for expert in stream.experts}
                inputs.append(read)
        return {**moments, "inputs": torch.cat(inputs)}

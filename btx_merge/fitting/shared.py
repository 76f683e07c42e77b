"""Shared weights by RegMean (arXiv 2212.09849, equation 2): least squares over all sources, on their texts.

Every attention projection, the embedding and the head becomes the matrix that comes nearest to what each source gives
on its own text. `regmean` takes the sources' own inputs. `regmean_merged` takes the merged model's, which earlier
layers have changed, so that the output projection makes up for what is already off.

Legend: B windows, T tokens in each, N = B * T, H hidden, Q inputs of the output projection, V vocabulary,
I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource, row_blocks
from btx_merge.fitting.equations import Moments, Statistics, mean_square, ridge_solution, scaled_off_diagonal
from btx_merge.fitting.head import fit_head_by_frequency
from btx_merge.fitting.passing import Passage
from btx_merge.fitting.reading import Tensors
from btx_merge.fitting.recipe import FitTask
from btx_merge.fitting.streams import TokenStream
from btx_merge.modeling.modeling_btx import BTXDecoderLayer

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SharedFit:
    """Fits the weights that all experts share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[TokenStream],
        sources: Mapping[str, DenseSource],
        statistics: Statistics,
        task: FitTask,
        passage: Passage,
    ):
        """Prepare to fit; nothing is computed yet.

        Args:
            texts: the domains' token streams, whose states the walk moves from layer to layer.
            sources: each domain's own dense source, by the domain's name.
        """
        self.checkpoint, self.texts, self.sources = checkpoint, texts, sources
        self.statistics, self.task, self.passage = statistics, task, passage
        self.device = checkpoint.device
        self.takes_own_inputs = task.combine == "regmean"

    def fit_embedding(self) -> None:
        """Solve RegMean where inputs are one-hot: every row is the mean by how often a source's text has its token.

        Each averaged source counts as one token more, everywhere, which leaves rows that no text has at the mean.
        """
        vocab, counts = self.checkpoint.tensors[EMBEDDING].shape[0], self._counts()
        averaged = float(self.task.averaged)
        for start, stop in row_blocks(vocab):
            mean = self.checkpoint.read(EMBEDDING, start, stop)
            # the mean row stands for one token of each source: total / weight is it where no text has the token
            total, weight = averaged * mean, torch.full((stop - start, 1), averaged, device=self.device)
            for stream in self.texts:
                count = counts[stream.name].to(self.device)[start:stop, None]
                total += count * self.sources[stream.name].rows(EMBEDDING, start, mean)
                weight += count
            self.checkpoint.write(EMBEDDING, total / weight, start)

    def fit_attention(self, index: int, layer: BTXDecoderLayer, parts: Mapping[str, Tensors]) -> None:
        """Solve for q, k and v; then, behind them, for the output projection.

        The sources' states are sent through their attention meanwhile.

        Args:
            parts: the weights of the sources' attention and of the norm before it, by the domain's name.
        """
        dense = {name: self.sources[name].layer(index, part) for name, part in parts.items()}
        norms = {name: own.input_layernorm for name, own in dense.items()}
        inputs = self.statistics.get(
            f"layer-{index:03}.inputs", lambda: self._input_moments(layer.input_layernorm, norms)
        )
        for name in _PROJECTIONS:
            weights = {domain: getattr(own.self_attn, name).weight for domain, own in dense.items()}
            self._solve(index, layer, name, *self._normal_equations(inputs, weights))
        # only now: the output projection's inputs depend on q, k and v as they were just solved for
        outputs = self.statistics.get(f"layer-{index:03}.outputs", lambda: self._output_moments(layer, dense))
        self._solve(index, layer, "o_proj", outputs["gram"], outputs["cross"])

    def fit_head(self) -> None:
        """Solve for the head of a model that has one of its own."""
        if HEAD not in self.checkpoint.tensors:
            return
        if self.task.head:
            by_domain = self.statistics.get("head-by-domain", self._head_moments)
            fit_head_by_frequency(self.checkpoint, self.sources, self._counts(), by_domain, self.task.regmean_ridge)
            return
        moments = self.statistics.get("head", lambda: self._input_moments(*self._last_norms()))
        for start, stop in row_blocks(self.checkpoint.tensors[HEAD].shape[0]):
            mean = self.checkpoint.read(HEAD, start, stop)
            weights = {stream.name: self.sources[stream.name].rows(HEAD, start, mean) for stream in self.texts}
            gram, cross = self._normal_equations(moments, weights)
            self.checkpoint.write(HEAD, ridge_solution(gram, cross, self.task.regmean_ridge, mean), start)

    def _counts(self) -> Moments:
        """Count every token in each domain's text, [V] by domain."""
        vocab = self.checkpoint.tensors[EMBEDDING].shape[0]
        return self.statistics.get("embedding", lambda: {s.name: self._token_counts(s, vocab) for s in self.texts})

    def _token_counts(self, stream: TokenStream, vocab: int) -> torch.Tensor:
        """Return [V], as if every domain had as many tokens as the mean of all, times its share."""
        ids = stream.ids[stream.fitted]
        mean = sum(other.ids[other.fitted].numel() for other in self.texts) / len(self.texts)
        return torch.bincount(ids.flatten(), minlength=vocab).float() * (stream.per_token * mean)

    def _normal_equations(
        self, moments: Moments, weights: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Gram [I, I] and cross moment [I, O], for targets that the sources' weights [O, I] give.

        A source's targets are W x of its own inputs x, so their cross moment with the fitted inputs x~ needs no second
        pass over the texts: `sum x~ (W x)^T = (sum x~ x^T) W^T`.
        """
        gram = moments["gram"].to(self.device)
        cross = sum(moments[name].to(self.device).double() @ weight.T.double() for name, weight in weights.items())
        return gram, torch.as_tensor(cross)

    def _solve(self, index: int, layer: BTXDecoderLayer, name: str, gram: torch.Tensor, cross: torch.Tensor) -> None:
        """Write a projection's solution, and put it into the layer as the file's dtype has rounded it."""
        projection = getattr(layer.self_attn, name)
        tensor = f"model.layers.{index}.self_attn.{name}.weight"
        # the prior is the mean, which the checkpoint still holds here
        mean, ridge = projection.weight, self.task.regmean_ridge
        solution = ridge_solution(gram.to(self.device), cross.to(self.device), ridge, mean)
        self.checkpoint.write(tensor, solution)
        projection.weight.data = self.checkpoint.read(tensor)

    def _input_moments(self, norm: LlamaRMSNorm, own_norms: Mapping[str, LlamaRMSNorm]) -> Moments:
        """Collect moments of what stands behind a norm, all [H, H].

        Args:
            own_norms: the sources', by the domain's name.

        Returns:
            `gram`: `sum x x^T` of the inputs that are fitted on, over all domains; by domain, their cross moment with
            the source's own inputs.
        """
        moments: Moments = {}
        for stream in self.texts:
            gram, cross = self._input_products(stream, norm, own_norms[stream.name])
            moments["gram"] = moments.get("gram", 0) + gram * stream.per_token
            moments[stream.name] = cross * stream.per_token
        return moments

    def _head_moments(self) -> Moments:
        """Collect the same of what stands behind the last norm, each domain's own and per token."""
        moments: Moments = {}
        norm, own_norms = self._last_norms()
        for stream in self.texts:
            gram, cross = self._input_products(stream, norm, own_norms[stream.name])
            tokens = stream.ids[stream.fitted].numel()
            moments |= {f"gram.{stream.name}": gram / tokens, f"cross.{stream.name}": cross / tokens}
        return moments

    def _input_products(
        self, stream: TokenStream, norm: LlamaRMSNorm, own_norm: LlamaRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the products of a domain's inputs behind a norm with themselves, and with the source's own, [H, H]."""
        gram = cross = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in stream.batches(stream.fitted):
            dense = own_norm(stream.dense[batch]).flatten(0, 1)
            fitted = dense  # x~, on which the weights are fitted; [N, H] as `dense`, the source's own x
            if not self.takes_own_inputs:
                fitted = norm(stream.merged[batch]).flatten(0, 1)
            gram = gram + (fitted.T @ fitted).double()
            cross = cross + (fitted.T @ dense).double()
        if self.takes_own_inputs:  # both are `sum x x^T` then
            gram = cross = scaled_off_diagonal(gram)
        return gram, cross

    def _output_moments(self, layer: BTXDecoderLayer, dense: Mapping[str, LlamaDecoderLayer]) -> Moments:
        """Collect the output projection's moments, `gram` [Q, Q] and `cross` [Q, H], over all domains.

        On the way the sources' states pass their attention, so that they are ready for the feed-forward blocks.
        """
        gram = cross = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.takes_own_inputs:
            for stream in self.texts:
                own = dense[stream.name]
                own_gram = scaled_off_diagonal(self._own_heads_gram(stream, own)) * stream.per_token
                gram = gram + own_gram
                cross = cross + own_gram @ own.self_attn.o_proj.weight.T.double()
            return {"gram": gram, "cross": cross}
        for stream in self.texts:
            self.passage.attend(stream, stream.dense, dense[stream.name])
        for stream in self.texts:
            for batch in stream.batches(stream.fitted):
                hidden = stream.merged[batch]
                heads = self.passage.attention(layer, stream, hidden, batch).heads
                # where the source's state stands behind attention, seen from the merged state before it
                aim = stream.dense[batch]
                target = (aim - hidden).flatten(0, 1)
                weighed = heads / mean_square(aim).flatten(0, 1)
                gram = gram + (weighed.T @ heads).double() * stream.per_token
                cross = cross + (weighed.T @ target).double() * stream.per_token
        return {"gram": gram, "cross": cross}

    def _own_heads_gram(self, stream: TokenStream, dense: torch.nn.Module) -> torch.Tensor:
        """Send a source's states through its attention; return its heads' Gram matrix [Q, Q] on fitted windows."""
        gram = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in stream.batches(stream.all):
            hidden = stream.dense[batch]
            added, heads = self.passage.attention(dense, stream, hidden, batch)
            stream.dense[batch] = hidden + added
            # held-out windows are sent on as well, but only tokens of windows that are fitted on count
            fitted = max(0, min(batch.stop, stream.fitted.stop) - batch.start) * stream.ids.shape[1]
            gram = gram + (heads[:fitted].T @ heads[:fitted]).double()
        return gram

    def _last_norms(self) -> tuple[LlamaRMSNorm, dict[str, LlamaRMSNorm]]:
        """Read the norm before the head, and the sources' own by the domain's name."""
        name = "model.norm.weight"
        own = {domain: self.passage.norm(source.tensor(name)) for domain, source in self.sources.items()}
        return self.passage.norm(self.checkpoint.read(name)), own

"""The routings of Branch-Train-MiX (arXiv 2403.07816), and the losses that keep routers in order.

Legend: N tokens, E experts, A active experts (all, unless some are switched off), K experts per token, L layers.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_btx import BTXConfig


class RouterRecords:
    """What the layers of one forward pass leave for the losses and for the selection bias.

    An object and not a list in `RouterCall`, because accelerate and FSDP hand copies of lists to a layer. It is
    closed after the pass: a layer that is recomputed in the backward pass leaves nothing more.
    """

    def __init__(self, with_statistics: bool):
        self.with_statistics = with_statistics
        self.statistics: list[torch.Tensor] = []
        """L tensors of `router_statistics`."""
        self.tokens_per_expert: list[torch.Tensor] = []
        """L tensors [E]."""
        self.tokens: torch.Tensor | int = 0
        """How many of the pass's tokens are no padding."""
        self.is_open = True


class RouterCall(NamedTuple):
    """What one forward pass tells every router."""

    num_experts_per_tok: int
    active: torch.Tensor | None = None
    """[A], the experts that may be chosen; None for all."""
    real_tokens: torch.Tensor | None = None
    """[N] bool, False for padding; None where nothing is. No floats: FSDP2's mixed precision would round them."""
    records: RouterRecords | None = None


class BTXRouting(nn.Module):
    """From router logits to experts and their weights. It learns nothing: a LoRA on the gate changes what comes in.

    The first layer of `sample_top_1` is soft, as in section 4.1.
    """

    temperature: torch.Tensor
    e_score_correction_bias: torch.Tensor

    def __init__(self, config: BTXConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.router_type = config.router_type
        if self.router_type == "sample_top_1":
            if layer_idx == 0:
                self.router_type = "soft"
            else:
                self.register_buffer("temperature", torch.ones((), dtype=torch.float32), persistent=False)
        self.has_bias = config.router_selection_bias and self.router_type in ("top_k", "switch")
        if self.has_bias:
            zeros = torch.zeros(config.num_local_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", zeros)

    def forward(
        self, router_logits: torch.Tensor, call: RouterCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn router logits [N, E] into weights [N, K] in float32, the logits again, and experts [N, K].

        The logits are returned because transformers records them here.
        """
        scores = router_logits.float()
        if call.active is not None:
            scores = scores[:, call.active]  # [N, A]: from here on an expert's number is its place among the active
        active = scores.shape[-1]
        per_token = {"top_k": min(call.num_experts_per_tok, active), "soft": active}.get(self.router_type, 1)

        # [N, A] both: the weight that each expert would have if all ran, and what ranks them
        mixture, probabilities = self._mixture(scores, per_token)
        chosen = self._choose(mixture if probabilities is None else probabilities, per_token, call)
        weights = self._weights(mixture, scores, chosen)
        overflow = self._overflow(chosen, active, call)
        records = call.records
        if self.has_bias and records is not None and records.is_open:
            records.tokens_per_expert.append(self._tokens_per_expert(chosen, call))

        if self.config.router_grad == "dense" and self.training and torch.is_grad_enabled() and per_token < active:
            weights, chosen = _straight_through(mixture, weights, chosen), _everything(mixture)
        if records is not None and records.with_statistics:
            with_z = self.config.router_z_loss_coef > 0
            statistics = router_statistics(scores, probabilities, weights, chosen, call, with_z)
            if records.is_open:  # computed in a recomputed pass too: it must do the same operations
                records.statistics.append(statistics)
        if overflow is not None:  # only the residual stream passes; the statistics have counted the choice before
            weights = weights.masked_fill(overflow, 0)
        if call.active is not None:
            chosen = call.active[chosen]  # back to numbers among all E
        return weights, router_logits, chosen

    def _mixture(self, scores: torch.Tensor, per_token: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights if every expert ran, [N, A], and the probabilities SoftMax(W x), or None if they are
        sampled.
        """
        if self.router_type == "sample_top_1" and self.training:
            noise = -torch.empty_like(scores).exponential_().log()  # -log of Exp(1) is Gumbel(0, 1)
            return ((scores + noise) / self.temperature).softmax(dim=-1), None
        probabilities = scores.softmax(dim=-1)
        if self.router_type == "top_k" and self.config.router_pre_softmax:
            # E C / K of arXiv 2410.07524: with alike experts and a router of zeros, the layer is the dense one
            return probabilities * (scores.shape[-1] * self.config.num_chunks / per_token), probabilities
        return probabilities, probabilities

    def _choose(self, ranks: torch.Tensor, per_token: int, call: RouterCall) -> torch.Tensor:
        """Choose the experts: positions in [0, A), [N, K]."""
        if self.router_type == "soft":
            return _everything(ranks)
        if self.has_bias:
            bias = self.e_score_correction_bias if call.active is None else self.e_score_correction_bias[call.active]
            ranks = ranks.detach() + bias  # the bias ranks only; weights stay those of the router
        return ranks.topk(per_token, dim=-1).indices

    def _weights(self, mixture: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the weights of the chosen experts, [N, K]."""
        if self.router_type == "sample_top_1" and not self.training:  # section 4.1: the likeliest alone
            return torch.ones_like(chosen, dtype=scores.dtype)
        weights = mixture.gather(-1, chosen)
        if self.router_type != "top_k" or self.config.router_pre_softmax:
            return weights
        # SoftMax(TopK(W x)) of section 3.2, rounded as Mixtral does it: an export gives the same bits
        total = weights.sum(dim=-1, keepdim=True)
        if not self.has_bias:
            return weights / total
        tiny = torch.finfo(total.dtype).tiny  # a bias may choose experts that all have a probability of 0
        return torch.where(total < tiny, scores.gather(-1, chosen).softmax(dim=-1), weights / total.clamp(min=tiny))

    def _overflow(self, chosen: torch.Tensor, active: int, call: RouterCall) -> torch.Tensor | None:
        """Return [N, 1], the tokens for which their expert has no room left in training; None where room is not
        limited.

        Capacity of the Switch Transformer (arXiv 2101.03961, equation 3), filled in the order of the tokens.
        """
        factor = self.config.expert_capacity_factor
        if self.router_type != "switch" or factor is None or not self.training:
            return None
        real = _counted(chosen, call)
        exact = torch.float32 if chosen.device.type == "mps" else torch.float64  # mps has no float64
        capacity = torch.ceil(factor * real.sum().to(exact) / active)
        asked = F.one_hot(chosen[:, 0], active) * real[:, None]
        # a token's place among those that ask for its expert; 1 for the first
        place = asked.cumsum(dim=0).gather(-1, chosen)
        return place > capacity

    @torch.no_grad()
    def _tokens_per_expert(self, chosen: torch.Tensor, call: RouterCall) -> torch.Tensor:
        """Count the tokens that were sent to each of all E experts, [E], without padding."""
        counts = torch.zeros_like(self.e_score_correction_bias)
        real = _counted(chosen, call).to(counts.dtype).repeat_interleave(chosen.shape[-1])
        return counts.index_add_(0, (chosen if call.active is None else call.active[chosen]).flatten(), real)


def routings_of(model: nn.Module) -> list[BTXRouting]:
    """Return what routes in a model, layer by layer."""
    return [module for module in model.modules() if isinstance(module, BTXRouting)]


def real_tokens(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Return [N], which of this call's tokens are no padding, from a mask [B, past + T]. Other masks do not tell."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].reshape(-1) != 0


def _everything(mixture: torch.Tensor) -> torch.Tensor:
    """Return all A positions for each of the N tokens."""
    return torch.arange(mixture.shape[-1], device=mixture.device).expand(mixture.shape)


def _counted(rows: torch.Tensor, call: RouterCall) -> torch.Tensor:
    """Return [N] of the rows' dtype: 1, and 0 for padding."""
    return rows.new_ones(rows.shape[:1]) if call.real_tokens is None else call.real_tokens.to(rows.dtype)


def router_statistics(
    scores: torch.Tensor,
    probabilities: torch.Tensor | None,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    call: RouterCall,
    with_z: bool,
) -> torch.Tensor:
    """Return [2A + 1]: mean gate weights u, mean probabilities p, mean squared log-sum-exp of the scores.

    Padding does not count.

    This is all that the losses need of a layer, so no router logits are kept for them.

    Args:
        scores: router logits of the active experts, [N, A].
        probabilities: their softmax where it is at hand.
        weights, chosen: of the experts that each token is sent to, [N, K].
        with_z: whether the last is wanted; otherwise it is 0.
    """
    counted = _counted(scores, call)
    # [N], sums to 1, so that a product with it is a mean over real tokens
    token_share = counted / counted.sum().clamp(min=1)
    gates = torch.zeros_like(scores).scatter(-1, chosen, weights)
    if probabilities is None:
        probabilities = scores.softmax(dim=-1)
    squared = (token_share @ scores.logsumexp(dim=-1).square())[None] if with_z else scores.new_zeros(1)
    return torch.cat([token_share @ gates, token_share @ probabilities, squared])


def _straight_through(mixture: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return [N, A] with the value of the chosen weights and the gradient of the mixture (DenseMixer's idea).

    The experts then run on all tokens, those with weight 0 for the router's gradient alone.
    """
    # mixture - mixture.detach() is 0 in the forward pass and the mixture's gradient in the backward pass
    value = torch.zeros_like(mixture).scatter(-1, chosen, weights.detach())
    return value + (mixture - mixture.detach())


def gumbel_temperature(step: float, rate: float = 1e-4, minimum: float = 0.5) -> float:
    """Return `max(0.5, exp(-r t))`, the temperature of Sample Top-1 at training step t (section 4.1)."""
    return max(minimum, math.exp(-rate * step))


class GlobalBatch:
    """Router statistics over all ranks and over the micro-batches of an optimizer step that were seen so far."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None  # tokens, labelled tokens, L (2A + 1) weighted statistics

    @torch.no_grad()
    def join(
        self,
        statistics: torch.Tensor,
        tokens: torch.Tensor,
        labelled: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token-weighted means [L, 2A + 1], and the factor that makes the parts' losses one loss.

        A micro-batch counts by its labelled tokens, a rank's part of it by its tokens. Where the ranks' losses are
        averaged, without `num_items_in_batch`, the factor is relative to a rank's equal share.

        Example: two micro-batches on one rank with 30 and 10 labelled tokens, `num_items_in_batch` 40. The first call
        returns its own statistics and 30 / 40; the second (30 first + 10 second) / 40 and 10 / 40.

        Args:
            statistics: of this micro-batch on this rank, [L, 2A + 1].
            tokens: its real tokens.
            labelled: its labelled tokens; when they add up to `num_items_in_batch` a new batch begins. None, as
                `num_items_in_batch`, where this call is the whole batch.
        """
        counts = tokens[None] if labelled is None else torch.stack([tokens, labelled.to(tokens)])
        total, ranks = torch.cat([counts, (statistics * tokens).flatten()]), 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            ranks = torch.distributed.get_world_size()
        factor = ranks * tokens / total[0]  # 1 where all ranks have as many tokens
        before, self._total = self._total, None
        if labelled is not None and num_items_in_batch is not None:
            factor = tokens / total[0] * total[1] / num_items_in_batch
            # a sum that would be larger than the batch is of an earlier batch that was never completed
            if before is not None and before.shape == total.shape and before[1] + total[1] <= num_items_in_batch:
                total = total + before
            if total[1] < num_items_in_batch:
                self._total = total
        return (total[len(counts) :] / total[0]).reshape(statistics.shape), factor


def load_balancing_loss(statistics: torch.Tensor, global_means: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the paper's balancing loss without its coefficient: `sum over layers of A * sum_i u_i p_i`, section 3.2.

    1 per layer at balance, up to A at collapse. Not transformers' loss for Mixtral, which pools the layers and
    counts choices instead of weighing them.

    Args:
        statistics: of `router_statistics`, [L, 2A + 1].
        global_means: the same over a larger batch (arXiv 2501.11873). The loss then has that batch's value, and the
            gradient that this part of the batch contributes to it.
    """
    experts = statistics.shape[-1] // 2
    u, p = statistics[:, :experts], statistics[:, experts : 2 * experts]
    if global_means is None:
        return experts * (u * p).sum()
    # the product rule: the value of the global batch, and the derivative by this part's u and p alone
    all_u, all_p = global_means[:, :experts], global_means[:, experts : 2 * experts]
    return experts * (all_u * all_p + all_p * (u - u.detach()) + all_u * (p - p.detach())).sum()


def router_z_loss(statistics: torch.Tensor) -> torch.Tensor:
    """Compute the z-loss without its coefficient: `sum over layers of mean_n logsumexp(W x_n)^2`.

    ST-MoE, arXiv 2202.08906, equation 5.
    """
    return statistics[:, -1].sum()

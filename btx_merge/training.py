"""Callbacks for a `transformers.Trainer` of your own: what the routers of a merged model need besides the loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from btx_merge.modeling import BTXPreTrainedModel
from btx_merge.modeling.routing_btx import gumbel_temperature


class GumbelAnnealing(TrainerCallback):
    """Anneals the temperature of `sample_top_1`: `max(minimum, exp(-rate * t))` (arXiv 2403.07816, section 4.1).

    t is the trainer's step, so that a resumed run goes on where it was. The paper's rate of 1e-4 per step was meant
    for 20,000 steps: in a shorter run give the rate `relative` to its length, where the same curve is a rate of 2.

    Args:
        rate: r, per step; 1e-4, or 2.0 for the whole run if `relative`.
        minimum: the temperature where annealing ends.
        relative: whether t is the part of the run that is done, in [0, 1].

    Raises:
        ValueError: at the beginning of training, if the model's routing has no temperature.
    """

    def __init__(self, rate: float | None = None, minimum: float = 0.5, relative: bool = False):
        self.rate = rate if rate is not None else (2.0 if relative else 1e-4)
        self.minimum = minimum
        self.relative = relative

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the temperature of this step."""
        t = state.global_step / max(state.max_steps, 1) if self.relative else state.global_step
        _btx_model(kwargs["model"]).set_router_temperature(gumbel_temperature(t, self.rate, self.minimum))


class RouterBiasUpdate(TrainerCallback):
    """Moves the selection bias of the routers after each optimizer step; see `BTXPreTrainedModel.update_router_bias`.

    Args:
        speed: what is added or taken away, in units of a probability.
    """

    def __init__(self, speed: float = 1e-3):
        self.speed = speed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the biases before the step is saved or evaluated."""
        _btx_model(kwargs["model"]).update_router_bias(self.speed)


def _btx_model(model: Any) -> BTXPreTrainedModel:
    """Return the model itself, whatever accelerate, PEFT or a compiler wrapped it in."""
    for module in model.modules():
        if hasattr(module, "set_router_temperature"):
            return module
    raise ValueError(f"{type(model).__name__} holds no BTX model.")

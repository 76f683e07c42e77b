"""The model code that travels inside every merged checkpoint. It needs torch and transformers only."""

from .configuration_btx import BTXConfig
from .modeling_btx import BTXForCausalLM, BTXModel, BTXPreTrainedModel

__all__ = ["BTXConfig", "BTXForCausalLM", "BTXModel", "BTXPreTrainedModel"]

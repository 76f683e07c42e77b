"""The model code that travels inside every merged checkpoint. It needs torch and transformers only.

Importing this package registers the classes with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_btx import BTXConfig
from .modeling_btx import (
    BTXForCausalLM,
    BTXForSequenceClassification,
    BTXForTokenClassification,
    BTXModel,
    BTXPreTrainedModel,
)

__all__ = [
    "BTXConfig",
    "BTXForCausalLM",
    "BTXForSequenceClassification",
    "BTXForTokenClassification",
    "BTXModel",
    "BTXPreTrainedModel",
]

AutoConfig.register(BTXConfig.model_type, BTXConfig, exist_ok=True)
AutoModel.register(BTXConfig, BTXModel, exist_ok=True)
AutoModelForCausalLM.register(BTXConfig, BTXForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BTXConfig, BTXForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(BTXConfig, BTXForTokenClassification, exist_ok=True)

"""What a run trains, and how a run asks for it: of this, `btx train` has one kind and `btx branch` another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from btx_merge.checkpoints.copying import CopyLayout
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.reporting import Reporter
from btx_merge.sources.locate import Located

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import TrainerCallback

    from btx_merge.finetuning.metrics import DomainLosses
    from btx_merge.sources.source import Source


class Trainee(Protocol):
    """A checkpoint that is trained: read into memory, changed there, measured meanwhile, and written again."""

    verb: str
    """The command's."""
    located: Located
    """The checkpoint that the run begins with."""
    stored: Mapping[str, StoredTensor]
    """Its tensors by name."""
    teachers: Sequence[Source]
    """The source that teaches each domain, in the domains' order; none where nobody teaches."""

    def digest(self) -> str:
        """Return a text that says which weights the checkpoint has."""

    def read_model(self, **settings: Any) -> Any:
        """Return the model of transformers.

        Args:
            settings: for `from_pretrained`.
        """

    def is_trained(self, name: str) -> bool:
        """Return whether the recipe trains a parameter, by its name."""

    def lora(self, model: nn.Module) -> LoraConfig:
        """Return what peft adds to the model where the recipe trains an adapter."""

    def meter(self, model: nn.Module, domains: Sequence[str], reporter: Reporter) -> DomainLosses:
        """Return what measures the steps that are logged."""

    def callbacks(self) -> list[TrainerCallback]:
        """Return what this kind of model wants done around the steps."""

    def layout(self) -> CopyLayout:
        """Return the files of the result with the places of all tensors in them."""

    def settings(self) -> dict[str, Any]:
        """Return what the record says of this kind of model alone."""

    def write_files(self, folder: Path, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write what the result has beside its weights.

        Args:
            folder: where an adapter's weights and config lie already.
            entry: the record of the run.
            history: what was logged.
        """

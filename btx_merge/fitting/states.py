"""Hidden states of all tokens between two layers: on the device where they fit, otherwise in the host's memory.

Legend: B windows, T tokens in each, H hidden.
"""

from __future__ import annotations

import torch

_PART_OF_FREE_MEMORY = 0.5
"""Of a GPU's free memory, what hidden states may take. The rest is for weights and activations."""


class States:
    """Hidden states [B, T, H], which are read and written a few windows at a time."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, place: torch.device):
        """Reserve memory for them.

        Args:
            device: where they are computed with.
            place: where they stay meanwhile: the device itself, or the host.
        """
        self.device = device
        # a GPU copies from and to pinned memory while the program goes on
        self.is_pinned = place.type == "cpu" and device.type == "cuda"
        self.kept = torch.empty(*shape, device=place, pin_memory=self.is_pinned)

    def __getitem__(self, windows: slice) -> torch.Tensor:
        """Return some windows' states, on the device; they are not to be changed in place."""
        return self.kept[windows].to(self.device, non_blocking=self.is_pinned)

    def __setitem__(self, windows: slice, values: torch.Tensor) -> None:
        """Put the states of some windows in place."""
        self.kept[windows].copy_(values, non_blocking=self.is_pinned)


def place_of_states(device: torch.device, values: int) -> torch.device:
    """Choose where that many float32 values stay between two layers."""
    if device.type == "cuda" and 4 * values <= _PART_OF_FREE_MEMORY * free_memory(device):
        return device
    return torch.device("cpu")  # also of a device whose free memory nobody tells


def free_memory(device: torch.device) -> int:
    """Return a GPU's free bytes, with those that torch has reserved but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

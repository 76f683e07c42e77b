"""Hides what vLLM brings for pictures and sound. Python imports this first where PYTHONPATH has the folder."""

import sys

for name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules[name] = None  # type: ignore[assignment]

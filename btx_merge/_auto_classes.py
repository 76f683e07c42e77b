"""`import btx_merge` makes transformers' Auto classes know BTX, and yet imports neither transformers nor torch.

The command must answer in a fraction of the time that those two take. So the registration waits until
somebody imports the Auto classes: a finder on `sys.meta_path` sees that import and registers after it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config(auto: ModuleType) -> None:
    from btx_merge.modeling.configuration_btx import BTXConfig

    auto.AutoConfig.register("btx", BTXConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from btx_merge.modeling.modeling_btx import BTXConfig, BTXForCausalLM, BTXModel

    auto.AutoModel.register(BTXConfig, BTXModel, exist_ok=True)
    auto.AutoModelForCausalLM.register(BTXConfig, BTXForCausalLM, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _AfterImport(MetaPathFinder, Loader):
    """Runs the registration of a module right after the module's own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRATIONS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        self._loaders[fullname] = spec.loader
        spec.loader = self
        return spec

    def __init__(self) -> None:
        self._loaders: dict[str, Loader] = {}

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        loader = self._loaders[module.__name__]
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = loader  # as if it had never been otherwise
        loader.exec_module(module)
        _REGISTRATIONS[module.__name__](module)


def register_with_transformers() -> None:
    """Registers BTX now where the Auto classes are imported, otherwise when they will be. Harmless if repeated."""
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())

"""Make transformers' Auto classes know BTX once `btx_merge` is imported, without importing transformers or torch.

The command must answer in a fraction of the time that those two take. So `btx_merge.modeling`, which registers
its classes, is imported when somebody looks up the model type "btx" for the first time. A finder on
`sys.meta_path` waits for the mapping in which transformers does that.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # as in `__init__`: whatever is imported here delays every command
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_WATCHED = "transformers.models.auto.configuration_auto"


def _watch_lookups(auto: ModuleType) -> None:
    """Import the model code at the first look-up of "btx" in CONFIG_MAPPING."""
    plain: type[Any] = type(auto.CONFIG_MAPPING)

    class WithBTX(plain):  # type: ignore[misc]
        def __contains__(self, key: object) -> bool:
            _import_if_btx(key)
            return bool(plain.__contains__(self, key))  # `super()` would ask for the class it had before

        def __getitem__(self, key: str) -> Any:
            _import_if_btx(key)
            return plain.__getitem__(self, key)

    def _import_if_btx(key: object) -> None:
        if key == "btx" and type(auto.CONFIG_MAPPING) is WithBTX:
            auto.CONFIG_MAPPING.__class__ = plain
            importlib.import_module("btx_merge.modeling")

    auto.CONFIG_MAPPING.__class__ = WithBTX


class _AfterImport:
    """A finder and loader: finds the watched module as everyone else does, and looks after it when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader: Loader = spec.loader
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is None:
            raise ImportError(f"{module.__name__} is executed without the spec that its import began with")
        spec.loader = module.__loader__ = self._loader  # as if it had never been otherwise
        self._loader.exec_module(module)
        _watch_lookups(module)


def register_with_transformers() -> None:
    """Make the Auto classes know BTX, now or when they are imported. Calling it again does no harm."""
    if "btx_merge.modeling" in sys.modules:
        return
    if _WATCHED in sys.modules:
        _watch_lookups(sys.modules[_WATCHED])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())

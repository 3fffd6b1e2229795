"""Registers the experts implementation as soon as transformers is there, without importing it.

``import flex`` stays quick, and ``model.set_experts_implementation("flex_kernels")`` works whichever of the
two packages was imported first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOME = "transformers.integrations.moe"


class AfterImport(MetaPathFinder):
    """Waits on ``sys.meta_path`` for the one module that holds transformers' registry, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    from flex import experts_implementation

    experts_implementation.register()


def register_with_transformers() -> None:
    """Register now if transformers' registry is loaded, else when it will be; again does no harm."""
    if HOME in sys.modules:
        register()
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())

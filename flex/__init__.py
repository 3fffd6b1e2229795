"""flex: grafting FLEx personal experts onto Hugging Face models, and the federated loop that trains them.

Names are imported when first used, so that ``import flex`` and the command line stay quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from flex.transformers_hook import register_with_transformers

_HOMES = {
    "Selection": "flex.select",
    "mark_local": "flex.state",
    "gates_shut": "flex.block",
    "Config": "flex.config",
    "GraftReport": "flex.grafting",
    "RunResult": "flex.federation",
    "add_lora": "flex.lora",
    "column_importance": "flex.importance",
    "gptq": "flex.feedback",
    "graft": "flex.grafting",
    "load": "flex.loading",
    "load_personal": "flex.state",
    "load_shared": "flex.state",
    "personal_state": "flex.state",
    "personalize": "flex.grafting",
    "record_gates": "flex.watch",
    "run": "flex.federation",
    "save": "flex.loading",
    "save_personal": "flex.state",
    "select_experts": "flex.select",
    "shared_state": "flex.state",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flex' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))


register_with_transformers()

"""FlexOlmo: softmax router, no shared expert."""

from __future__ import annotations

from flex.models.base import Adapter

ADAPTER = Adapter("flex_olmo", ("FlexOlmoSparseMoeBlock",))

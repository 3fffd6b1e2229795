"""The fused Mixture-of-Experts layer of FLEx (arXiv 2506.00965): a personal expert and its adaptive gate."""

from flex_kernels.checkpoint import checkpoint_contexts
from flex_kernels.dispatch import BackendStatus, backends
from flex_kernels.layer import flex_moe
from flex_kernels.modules import FlexMoE
from flex_kernels.precision import allow_int8_products
from flex_kernels.quantize import Quantized
from flex_kernels.types import Experts, Personal, Routed, Router, Shared

__all__ = [
    "BackendStatus",
    "Experts",
    "FlexMoE",
    "Personal",
    "Quantized",
    "Routed",
    "Router",
    "Shared",
    "allow_int8_products",
    "backends",
    "checkpoint_contexts",
    "flex_moe",
]
__version__ = "0.1.0"

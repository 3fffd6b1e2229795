"""A small Mixture-of-Experts model for demos, made offline from a dense one.

``demo_model()`` gives its Hugging Face folder; ``convert`` does the same to any Llama.
"""

from .export import save, to_mixtral
from .gguf_llama import DenseModelMissing, load_dense
from .layers import Recipe
from .pipeline import calibration_ids, convert, default_cache, demo_model

__all__ = [
    "DenseModelMissing",
    "Recipe",
    "calibration_ids",
    "convert",
    "default_cache",
    "demo_model",
    "load_dense",
    "save",
    "to_mixtral",
]

"""A pytest plugin (``-p amx_emulated``) that puts another build of ``flex_kernels._cpu_ops`` in the place of the
installed one: the build with emulated tiles, or one with a sanitizer. ``FLEX_TEST_CPU_OPS`` is its path.
"""

import importlib.util
import os
import sys

# First: the extension must find torch's own libgomp in the process.
import torch  # noqa: F401

NAME = "flex_kernels._cpu_ops"


def install(path: str) -> None:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


install(os.environ["FLEX_TEST_CPU_OPS"])

"""A pytest plugin (``-p amx_emulated``) that puts another build of ``flex_kernels._cpu_ops`` in the place of
the installed one, from the path in ``FLEX_TEST_CPU_OPS``. With ``FLEX_TEST_TRAP``, the path of
trapped_tiles.cpp's library, its tile instructions are done by a signal handler.
"""

import ctypes
import importlib.util
import os
import sys

import pytest

# Before the extension: torch's own libgomp must be the one in the process.
import torch  # noqa: F401

NAME = "flex_kernels._cpu_ops"
TRAP = ctypes.CDLL(os.environ["FLEX_TEST_TRAP"]) if "FLEX_TEST_TRAP" in os.environ else None


def install(path: str) -> None:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRAP is not None:
        TRAP.tiles_trapped.restype = ctypes.c_uint64
        terminalreporter.write_line(f"{TRAP.tiles_trapped()} tile instructions trapped")


install(os.environ["FLEX_TEST_CPU_OPS"])
if TRAP is not None and TRAP.trap_tiles():
    raise OSError("the handler of invalid opcodes was not installed")

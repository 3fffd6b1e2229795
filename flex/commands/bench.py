"""Measures the fused layer against transformers on this machine and draws the result.

Needs the source tree: benchmarks/ is not part of the installed package. Cases that the
result file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from flex.commands.console import Interrupted, add_quiet, positive

HELP = "the fused layer against transformers, on this machine"
QUICK = {"shapes": ("demo",), "dtypes": ("bf16",), "tokens": (64, 256), "repeats": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="e.g. qwen1.5 olmoe demo (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), help="default: both")
    parser.add_argument("--tokens", nargs="+", type=positive, metavar="T", help="default: 64 to 8192")
    parser.add_argument("--repeats", type=positive, metavar="N", help="most samples of a case")
    parser.add_argument("--out", type=Path, default=Path("bench/layer.json"), metavar="FILE.json")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--quick", action="store_true", help="one small shape, unless others are named")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    layer = benchmark("layer")

    def say(text: str) -> None:
        if not arguments.quiet:
            print(text, file=sys.stderr, flush=True)

    given = {
        "shapes": arguments.shape,
        "dtypes": arguments.dtype,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
    }
    wanted = (QUICK if arguments.quick else {}) | {k: v for k, v in given.items() if v is not None}
    out = arguments.out.resolve()
    try:
        result = layer.run(**wanted, out=out, progress=say, memory=not arguments.no_memory)
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped; the same command goes on with the cases that are left") from stop

    from flex.report.bench import plot_bench

    print(f"{arguments.out}\n{plot_bench(result, arguments.out.with_suffix('.png'))}")
    return 0


def benchmark(name: str) -> ModuleType:
    """benchmarks.``name`` from the source tree that this package runs from.

    Raises:
        ImportError: there is no source tree.
    """
    import flex

    root = Path(flex.__file__).resolve().parent.parent
    if not (root / "benchmarks" / f"{name}.py").is_file():
        raise ImportError(
            f"flex-moe bench needs benchmarks/{name}.py of the source tree, which is not in {root}: "
            "clone the repository and run make bench there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    # The benchmark starts processes of its own, which must find it too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return importlib.import_module(f"benchmarks.{name}")

"""The GPU suite's comparisons with float64, on an emulated GPU: the Triton kernels' own code, at real sizes.

python tests/emulated_checks.py                          bfloat16 on sm_90, every size (hours on one core)
python tests/emulated_checks.py --capability 80 --most 200    those of at most 200 tokens
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from ptx_emulator.gpu import emulated_gpu  # noqa: E402

from benchmarks.gpu_checks import BFLOAT16_SIZES, QUANTISED_SIZES, SIZES, check_layers  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, choices=(80, 90))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--most", type=int, default=10**9, help="tokens of the largest size")
    parser.add_argument("--least", type=int, default=0, help="tokens of the smallest size")
    parser.add_argument("--multiprocessors", type=int, default=8)
    options = parser.parse_args()
    failed = 0
    for sizes in (*SIZES, *BFLOAT16_SIZES, *QUANTISED_SIZES):
        if not options.least <= sizes[0] <= options.most:
            continue
        began = time.monotonic()
        with emulated_gpu(options.capability, options.multiprocessors) as gpu:
            dtype = (getattr(torch, options.dtype),)
            (record,) = check_layers(["triton"], "cpu", (sizes,), dtype, seed=0)
        failed += not record["passed"] or bool(gpu.hazards)
        taken = f"{time.monotonic() - began:.0f} s, {len(gpu.launched)} launches"
        print(record, gpu.hazards or "", taken, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

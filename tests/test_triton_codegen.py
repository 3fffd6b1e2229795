"""What the compiler makes of the Triton kernels for sm_80 and sm_90, with no GPU: instructions, spills,
resources.

After a wanted change: ``python -m flex_kernels.triton.codegen tests/triton_codegen_baseline.json``.
"""

import json
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from flex_kernels.triton import codegen, launch, tiles  # noqa: E402
from flex_kernels.triton.route import route  # noqa: E402
from flex_kernels.triton.route_backward import route_backward  # noqa: E402

BASELINE = Path(__file__).parent / "triton_codegen_baseline.json"
GATHERED = ("up_swiglu", "down_backward")
IN_ORDER = ("dense", "personal", "copied")
CODED = ("int8", "nf4")
PRODUCTS = ("up_swiglu", "down", "up_backward", "weight_grad", "route")


@pytest.fixture(scope="module")
def compiled():
    return codegen.compile_all(codegen.cases())


def test_sources_are_parsed_one_at_a_time():
    running, overlaps = [], []

    def parse(function):
        running.append(function)
        time.sleep(0.002)
        overlaps.append(len(running))
        running.remove(function)
        return function * 2

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codegen.in_turns(parse), range(20))) == [2 * i for i in range(20)]
    assert overlaps == [1] * 20


def kernel(case: str) -> str:
    return case.split()[-1]


def test_no_kernel_spills(compiled):
    assert {name: r.stack for name, r in compiled.items() if r.stack} == {}


def test_shared_memory_fits_every_chip_of_the_generation(compiled):
    for name, r in compiled.items():
        assert r.shared <= codegen.SHARED_LIMIT[int(name[3:5])], name


def test_every_16_bit_product_runs_on_the_tensor_cores(compiled):
    for name, r in compiled.items():
        if "bf16" in name and kernel(name).startswith(PRODUCTS):
            # wgmma takes 64 rows at least.
            narrow = name.startswith("sm_80") or "m16" in name or kernel(name).startswith("route")
            assert r.mma > 0 if narrow else r.wgmma > 0, f"{name}: {r}"


def test_no_product_on_hopper_takes_an_operand_from_registers(compiled):
    """ptxas 12.8 and 12.9 may reuse such registers before wgmma has read them (triton-lang/triton#11781)."""
    assert {name for name, r in compiled.items() if r.register_wgmma} == set()


def test_float32_products_stay_off_the_tensor_cores(compiled):
    for name, r in compiled.items():
        if "fp32" in name:
            assert r.wgmma == r.mma == 0, f"{name}: tf32 would lose 13 bits of float32"


def test_hopper_fetches_weights_with_the_copy_engine(compiled):
    for name, r in compiled.items():
        if ("sm_90 bf16 m128" in name or "sm_90 bf16 m64" in name) and not name.endswith(CODED):
            assert r.tma_load > 0, f"{name}: {r}"


def test_quantised_weights_are_decoded_without_a_table_in_global_memory(compiled):
    """Such a table would take a load a weight, and keep the codes out of the pipeline of 16-byte copies."""
    launch, capability = codegen.cases()["sm_80 bf16 m64 down_nf4"]
    ptx = codegen.compile_launch(launch, capability).asm["ptx"]
    tile, threads = 64 * 64, 128
    assert len(re.findall(r"ld\.global", ptx)) < tile // threads
    assert len(re.findall(r"ld\.shared", ptx)) >= tile // threads
    assert compiled["sm_80 bf16 m64 down_nf4"].cp_async > 0


def test_gathered_rows_are_copied_16_bytes_at_a_time_and_others_by_the_copy_engine(compiled):
    for name, r in compiled.items():
        if "bf16" not in name or not kernel(name).startswith(GATHERED):
            continue
        described = "sm_90 bf16 m128" in name or "sm_90 bf16 m64" in name
        if described and kernel(name).endswith(IN_ORDER):
            assert r.cp_async == 0, f"{name}: {r}"
        else:
            assert r.cp_async > 0, f"{name}: {r}"


def test_nothing_got_worse_than_the_committed_baseline(compiled):
    baseline = json.loads(BASELINE.read_text()).get(triton.__version__)
    if baseline is None:
        pytest.skip(f"no baseline for triton {triton.__version__}: the limits above still hold")
    assert baseline.keys() == compiled.keys(), "run the command in this file's docstring"
    for name, r in compiled.items():
        was = baseline[name]
        assert r.registers <= was["registers"] + 8, (
            f"{name}: {r.registers} registers, were {was['registers']}"
        )
        assert r.shared <= was["shared"], f"{name}: {r.shared} bytes of shared memory, were {was['shared']}"
        assert r.occupancy >= was["occupancy"], f"{name}: occupancy {r.occupancy}, was {was['occupancy']}"
        for counted in ("wgmma", "mma", "tma_load", "cp_async"):
            now, then = getattr(r, counted), was[counted]
            assert (now > 0) == (then > 0), f"{name}: {now} {counted} instructions, were {then}"


@pytest.mark.parametrize("tokens", [8191, 8193, 9001])
def test_a_number_of_tokens_compiles_nothing_anew(tokens):
    """Each variant costs seconds on first use: sizes and starts that move with T must not make one."""
    plan = tiles.HOPPER[128]
    found, wanted = (
        {name: codegen.specialisation(recorded) for name, recorded in launches.items()}
        for launches in (codegen.launches_of(codegen.QWEN15_MOE, t, plan) for t in (tokens, 8192))
    )
    assert found == wanted
    starts_move = {*launch.INDEX_POINTERS, *launch.ROW_FACTORS, "gate_ptr", "shared_gate_ptr"}
    for name, recorded in codegen.launches_of(codegen.QWEN15_MOE, 8192, plan).items():
        aligned = {recorded.kernel.arg_names[i] for (i,) in codegen.specialisation(recorded)[2]}
        if name != "weight_grad":
            assert not aligned & starts_move, f"{name} is compiled again for another alignment"


def instructions(launch: codegen.Launch) -> list[tuple[int, str]]:
    """(address, text) of the machine code of ``launch`` for sm_90."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(codegen.compile_launch(launch, 90).asm["cubin"])
        file.flush()
        command = [str(codegen.cuobjdump()), "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(int(a, 16), i) for a, i in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text, re.M)]


@pytest.mark.parametrize(
    "name",
    [
        *("up_swiglu", "up_swiglu_preact", "down", "up_backward", "down_backward"),
        *("up_swiglu_dense", "up_swiglu_copied", "down_backward_personal", "down_backward_copied"),
    ],
)
def test_a_flattened_loop_leaves_accumulators_alone_while_products_are_in_flight(name):
    """Its loop sets them to zero after a tile. On the way round without an epilogue the last products still
    run, so an instruction that touched their registers would read or write them too early."""
    plan = tiles.HOPPER[128]
    assert plan.up.flatten and plan.down.flatten and plan.down_backward.flatten and plan.up_backward.flatten
    code = instructions(codegen.launches_of(codegen.QWEN15_MOE, 8192, plan)[name])
    at = {address: i for i, (address, _) in enumerate(code)}

    def target(i):
        return at[int(re.search(r"0x([0-9a-f]+)$", code[i][1].strip()).group(1), 16)]

    products = [i for i, (_, text) in enumerate(code) if text.startswith("HGMMA")]
    waits = [i for i, (_, text) in enumerate(code) if "WARPGROUP.DEPBAR" in text and i > products[-1]]
    assert code[waits[0]][1].strip().endswith("0x1"), "one product stays in flight"
    # The last branch before the wait for all products skips that wait and the epilogue.
    skip = max(i for i in range(waits[0], waits[1]) if "BRA" in code[i][1])
    rest = target(skip)
    back = next(i for i in range(rest, len(code)) if "BRA" in code[i][1] and target(i) < products[0])
    columns, first = re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+),", code[products[0]][1]).groups()
    accumulators = {f"R{int(first) + j}" for j in range(int(columns) // 2)}
    path = [*range(target(back), skip + 1), *range(rest, back + 1)]
    touching = [
        code[i][1]
        for i in path
        if i not in products and accumulators & set(re.findall(r"\bR\d+\b", code[i][1]))
    ]
    assert len(path) < 400 and touching == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "experts"), [(8192, 128), (64, 512)])
def test_the_routers_backward_does_not_spill_with_many_experts(tokens, experts, capability):
    shape = codegen.Shape(H=2048, I=768, E=experts, K=8)
    recorded = codegen.launches_of(shape, tokens, tiles.HOPPER[128])["route_backward"]
    found = codegen.resources(codegen.compile_launch(recorded, capability), capability)
    assert found.stack == 0 and found.shared <= codegen.SHARED_LIMIT[capability]


@pytest.mark.parametrize("capability", [80, 90])
def test_a_float32_router_of_many_experts_fits_every_chip(capability):
    meta, T, H, E, K = codegen.meta, 8192, 2048, 512, 8
    f32, x = torch.float32, meta(T, H)
    router, gates, opened = meta(E, H, dtype=f32), meta(2, H, dtype=f32), meta(2, T, dtype=f32)
    ids, weights = meta(T, K, dtype=torch.int32), meta(T, K, dtype=f32)
    with codegen.recorded_launches() as launches:
        route(x, router, None, gates, meta(2, dtype=f32), K, True, "softmax", 1.0, False)
        saved = x, router, gates, ids, weights, opened
        needs = [True, False, True, True]
        route_backward(weights, opened, meta(0, E, dtype=f32), *saved, True, "softmax", 1.0, needs, x)
    for recorded in launches:
        found = codegen.resources(codegen.compile_launch(recorded, capability), capability)
        assert found.stack == 0 and found.shared <= codegen.SHARED_LIMIT[capability], recorded.kernel


@pytest.mark.parametrize("name", ["down_backward", "down_backward_personal", "down_backward_copied"])
@pytest.mark.parametrize("columns", [72, 1407, 1402])
def test_what_lies_over_z_is_stored_by_the_thread_that_read_it_or_behind_a_barrier(columns, name):
    """The up half of dZ does not depend on the value that it replaces: no data holds back its store."""
    shape = codegen.Shape(H=64, I=columns, E=4, K=2)
    recorded = codegen.launches_of(shape, 1024, tiles.HOPPER[128])[name]
    ir = codegen.compile_launch(recorded, 90).asm["ttgir"]
    rows = r"tensor<128x\d+x!tt.ptr<bf16>, (#\w+)>"
    loaded, stored = (
        {m for line in ir.splitlines() if what in line for m in re.findall(rows, line)}
        for what in ("tt.load", "tt.store")
    )
    assert loaded and stored
    barriers = len(re.findall(r"(?:gpu|ttg)\.(?:barrier|local_barrier)", ir))
    assert loaded == stored if columns % 8 == 0 else barriers == 4


def test_occupancy_is_what_the_tightest_resource_allows():
    # 168 registers of 256 threads: 43008 of 65536. 100 KiB: two in 228 KiB. 8 warps: 64 / 8.
    assert codegen.occupancy(registers=168, shared=1024, warps=8, capability=90) == 1
    assert codegen.occupancy(registers=32, shared=100 * 1024, warps=8, capability=90) == 2
    assert codegen.occupancy(registers=32, shared=1024, warps=8, capability=90) == 8


@pytest.mark.parametrize(
    "plans", [tiles.AMPERE, tiles.HOPPER, tiles.FLOAT32], ids=["ampere", "hopper", "float32"]
)
def test_every_tile_of_a_plan_shares_its_tile_table(plans):
    for m, plan in plans.items():
        assert {plan.up.m, plan.down.m, plan.down_backward.m, plan.up_backward.m} == {m}

"""Large buffers of the CPU kernels: whose pages they get, how much of it is kept, and who may hold what."""

import threading
from pathlib import Path

import pytest
import torch
from cases import make_case

from flex.memory import give_back_freed
from flex_kernels import flex_moe

native = pytest.importorskip("flex_kernels.cpu.native", reason="the native extension is not built")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    native.give_back_pages()
    yield
    native.give_back_pages()


def large(mib: int) -> torch.Tensor:
    return native.empty(mib * MIB, dtype=torch.uint8)


def flags_of_memory_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages on this system"
)
def test_large_buffers_ask_for_huge_pages_and_small_ones_do_not():
    some = native.empty(48 << 10, 1 << 9, dtype=torch.bfloat16)
    assert "hg" in flags_of_memory_at(some.data_ptr() + some.nbytes // 2)
    # Of a size that malloc maps by itself, so that the flag can be no neighbour's.
    plain = torch.empty(48 << 20, dtype=torch.uint8)
    assert "hg" not in flags_of_memory_at(plain.data_ptr() + plain.nbytes // 2)


@pytest.mark.parametrize("shape", [(3, 5), (5 << 20, 2), (2 << 20, 3, 1), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_buffer_is_a_plain_tensor_that_can_be_written_to_its_end(shape, dtype):
    t = native.empty(*shape, dtype=dtype)
    assert t.shape == shape and t.dtype == dtype and t.is_contiguous() and not t._is_view()
    t.fill_(3)
    assert bool((t == 3).all())


def test_a_buffer_gets_the_pages_of_one_of_about_its_size_that_is_gone():
    first = large(40)
    address = first.data_ptr()
    second = large(40)
    assert second.data_ptr() != address
    del first
    assert large(39).data_ptr() == address


def test_pages_stay_with_every_tensor_that_shares_them():
    part = large(40)[:10].fill_(7)
    others = [large(40).fill_(1) for _ in range(3)]
    assert part.tolist() == [7] * 10 and len(others) == 3


def test_several_buffers_share_the_pages_of_one_and_one_gets_those_of_several():
    whole = large(100)
    address = whole.data_ptr()
    del whole
    parts = [large(20), large(30), large(50)]
    assert [t.data_ptr() - address for t in parts] == [0, 20 * MIB, 50 * MIB]
    del parts[1]
    parts.append(large(29))
    assert parts[2].data_ptr() == address + 20 * MIB
    parts.clear()
    assert large(100).data_ptr() == address


def test_what_is_kept_is_bounded():
    held = [large(96) for _ in range(4)]
    held.clear()
    assert native.KEPT_BYTES == 256 * MIB
    assert native.give_back_pages() == 256 * MIB
    assert native.give_back_pages() == 0
    whole = large(300)
    address = whole.data_ptr()
    del whole
    assert large(256).data_ptr() == address


def test_kept_pages_never_add_to_the_most_that_was_in_use():
    first = large(60)
    del first
    # The pages of the first do not suffice: 40 of them go back, as only 100 were ever in use.
    second = large(100)
    assert native.give_back_pages() == 0
    third = large(60)
    del second
    fourth = large(64)
    # In use at one time: 160. Now 124, and 36 of the second's pages.
    assert native.give_back_pages() == 36 * MIB
    assert third.data_ptr() != fourth.data_ptr()


def test_a_repeated_step_finds_its_own_pages():
    def step() -> list[int]:
        sums, hidden = large(64), large(20)
        found = [sums.data_ptr(), hidden.data_ptr()]
        del hidden
        del sums
        found.append(large(90).data_ptr())
        return found

    step()
    assert step() == step()
    assert native.give_back_pages() == 90 * MIB


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no account of resident pages here")
def test_giving_back_returns_the_memory_to_the_system():
    before = resident()
    filled = large(200).fill_(1)
    del filled
    assert resident() - before > 150 * MIB
    give_back_freed()
    assert resident() - before < 50 * MIB


def test_threads_never_share_a_buffer():
    wrong = []

    def work(mark: int) -> None:
        for _ in range(30):
            mine = large(9).fill_(mark)
            if not bool((mine == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"bytes must be at least 1, got {size}"):
        native._cpu_ops.Pages(size)


def test_more_than_the_system_has_is_a_memory_error():
    with pytest.raises(MemoryError):
        native.empty(1 << 60, dtype=torch.uint8)
    # What was not to be had was never in use.
    for mib in (40, 50):
        buffer = large(mib)
        del buffer
    assert native.give_back_pages() == 50 * MIB


def test_steps_that_reuse_pages_have_the_bits_of_the_first(monkeypatch):
    """Pages hold what an earlier step left: nothing may be read before it is written."""
    monkeypatch.setattr(native, "PAGES_FROM", 1)
    case = make_case(T=150, H=96, E=3, I=64).requiring()
    leaves = list(case.tensors().values())

    def step() -> list[torch.Tensor]:
        y = flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, save="preact")
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    want = step()
    poison = [native.empty(n, dtype=torch.uint8).fill_(255) for n in (1 * MIB, 2 * MIB, 4 * MIB, 6 * MIB)]
    del poison
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(), want))

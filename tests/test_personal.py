"""The trained part of a grafted layer by itself: how a low-rank expert starts, and the weights it makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flex import personal
from flex.personal import PersonalCopy, PersonalLoRA
from flex_kernels import Experts


def test_the_seed_of_a_low_rank_start_does_not_depend_on_dtype():
    experts = Experts(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    one, two = (
        PersonalLoRA(experts, 1, torch.zeros(6), dtype, rank=2, generator=torch.Generator().manual_seed(4))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(one.gate_up_in.bfloat16(), two.gate_up_in)
    assert one.gate_up_in.abs().max() <= 6**-0.5
    assert isinstance(PersonalCopy(experts, 1, torch.zeros(6)).record_over(experts).down, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_low_rank_weight_and_its_gradients(dtype, monkeypatch):
    monkeypatch.setattr(personal, "PIECE", 40)
    generator = torch.Generator().manual_seed(0)
    frozen, gradient = (torch.randn(11, 13, generator=generator).to(dtype) for _ in range(2))
    factors = [torch.randn(s, generator=generator).requires_grad_() for s in ((11, 3), (3, 13))]
    found = personal.adapted_weight(frozen, *factors, 0.7)
    found.backward(gradient)
    out, into = (factor.detach().double() for factor in factors)
    exact = frozen.double() + 0.7 * out @ into
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, atol=1e-6, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6
    )
    wide = gradient.double()
    torch.testing.assert_close(factors[0].grad.double(), 0.7 * wide @ into.t(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(factors[1].grad.double(), 0.7 * out.t() @ wide, atol=1e-5, rtol=1e-5)

"""FlexMoE: the module holds what it was given, trains only the personal part, and saves and loads exactly."""

import pytest
import torch
from cases import make_case, relative_error

from flex_kernels import FlexMoE, flex_moe


def module(**options) -> FlexMoE:
    case = make_case()
    return FlexMoE(case.router, case.experts, case.shared, **options)


def test_forward_is_flex_moe_on_its_parameters():
    case = make_case(personal=False)
    m = FlexMoE(case.router, case.experts, case.shared)
    assert torch.equal(m(case.x_TH), flex_moe(case.x_TH, case.router, case.experts, None, case.shared))


def test_frozen_weights_are_not_copied():
    case = make_case()
    m = FlexMoE(case.router, case.experts, case.shared)
    assert m.gate_up.data_ptr() == case.experts.gate_up.data_ptr()
    assert m.shared_down.data_ptr() == case.shared.down.data_ptr()


def test_the_personal_expert_starts_as_a_copy_gated_by_the_router_row():
    m = module()
    own = m.personalize(3)
    assert torch.equal(own.gate_up, m.gate_up[3]) and torch.equal(own.down, m.down[3])
    assert own.gate_up.data_ptr() != m.gate_up[3].data_ptr()
    assert torch.equal(own.gate_weight, m.router_weight[3]) and own.gate_bias.item() == 0
    trained = {name for name, p in m.named_parameters() if p.requires_grad}
    assert trained == {"personal.gate_up", "personal.down", "personal.gate_weight", "personal.gate_bias"}


def test_a_shut_gate_gives_the_original_layer():
    m = module()
    x = torch.randn(9, 24)
    before = m(x)
    m.personalize(1)
    with torch.no_grad():
        m.personal.gate_bias.fill_(-1e4)
    assert torch.equal(m(x), before)


@pytest.mark.parametrize("expert", [-1, 5])
def test_an_unknown_expert_is_refused(expert):
    with pytest.raises(IndexError, match=rf"expert={expert} is not one of the 5 routed experts"):
        module().personalize(expert)


def test_the_state_dict_gives_the_same_outputs_back():
    m = module(mix="convex")
    m.personalize(2)
    with torch.no_grad():
        m.personal.down.add_(0.1)
    other = module(mix="convex")
    other.personalize(0)
    other.load_state_dict(m.state_dict())
    x = torch.randn(4, 24)
    assert torch.equal(m(x), other(x))


def test_one_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    m = module()
    m.personalize(0)
    x, target = torch.randn(32, 24), torch.randn(32, 24)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = (m(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_router_logits_come_back_when_asked_for():
    m = module()
    x = torch.randn(3, 24)
    y, logits = m(x, return_router_logits=True)
    assert torch.equal(y, m(x))
    assert relative_error(logits, x.double() @ m.router_weight.double().t()) < 1e-6

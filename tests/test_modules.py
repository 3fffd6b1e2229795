"""FlexMoE: the module holds what it was given, trains only the personal part, and saves and loads exactly."""

from dataclasses import replace

import pytest
import torch
from cases import make_case, relative_error

from flex_kernels import Experts, FlexMoE, Routed, flex_moe


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


@pytest.mark.parametrize("expert", [1.5, "1", True, None])
def test_an_expert_that_is_no_integer_is_refused(expert):
    with pytest.raises(TypeError, match=rf"expert must be an integer from 0 to 4, got {expert!r}"):
        module().personalize(expert)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": {"weight": torch.zeros(3, 24)}}, r"router.weight must be \[5, 24\], got \[3, 24\]"),
        ({"router": {"top_k": 6}}, r"top_k=6 exceeds the 5 experts"),
        (
            {"experts": {"down": torch.zeros(5, 24, 3)}},
            r"experts.down must be \[5, 24, \d+\], got \[5, 24, 3\]",
        ),
        (
            {"experts": {"gate_up": torch.zeros(5, 4, 24, dtype=torch.int64)}},
            r"experts.gate_up must be float32",
        ),
        ({"experts": {"gate_up": [1]}}, r"experts.gate_up must be a tensor \[E, 2\*I, H\], got list"),
        ({"shared": {"gate_weight": torch.zeros(23)}}, r"shared.gate_weight must be \[24\], got \[23\]"),
        ({"mix": "foo"}, r"mix='foo' is not one of 'add', 'convex'"),
        ({"save": "all"}, r"save='all' is not one of 'auto', 'recompute', 'preact'"),
        ({"backend": "tpu"}, r"backend='tpu' is not one of 'auto', 'reference'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_when_the_module_is_made(changes, message):
    case = make_case()
    given = {"router": case.router, "experts": case.experts, "shared": case.shared}
    for name, change in changes.items():
        given[name] = replace(given[name], **change) if isinstance(change, dict) else change
    with pytest.raises((TypeError, ValueError), match=message):
        FlexMoE(**given)


@pytest.mark.parametrize("router", [Routed(torch.zeros(3, 2), torch.zeros(3, 2)), None])
def test_a_module_needs_a_router_of_its_own(router):
    with pytest.raises(TypeError, match=r"router must be a Router, got "):
        FlexMoE(router, make_case().experts)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_experts_and_those_on_the_meta_device_are_accepted(kind):
    case = make_case(dtype=torch.bfloat16)
    quantised = Experts.quantize(case.experts.gate_up, case.experts.down, kind)
    assert FlexMoE(case.router, quantised)(case.x_TH).shape == case.x_TH.shape
    bare = Experts(case.experts.gate_up.to("meta"), case.experts.down.to("meta"))
    assert FlexMoE(replace(case.router, weight=case.router.weight.to("meta")), bare).gate_up.is_meta


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

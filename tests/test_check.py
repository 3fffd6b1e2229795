"""Every wrong argument is refused by name, with what was given and what is accepted."""

from dataclasses import replace

import pytest
import torch
from cases import make_case

from flex_kernels import Routed, Router, flex_moe


def call(case, **changes):
    options = {
        k: changes.pop(k) for k in list(changes) if k in ("mix", "save", "backend", "return_router_logits")
    }
    case = replace(case, **changes)
    return flex_moe(case.x_TH, case.router, case.experts, case.personal, case.shared, **options)


@pytest.fixture
def case():
    return make_case(T=3, H=8, E=4, K=2, I=6)


def test_top_k_beyond_the_experts_names_both_numbers(case):
    with pytest.raises(ValueError, match=r"top_k=9 exceeds the 4 experts of router.weight \[4, 8\]"):
        call(case, router=replace(case.router, top_k=9))


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True])
def test_top_k_must_be_a_positive_integer(case, top_k):
    with pytest.raises(ValueError, match=r"router.top_k must be an integer of at least 1"):
        call(case, router=replace(case.router, top_k=top_k))


@pytest.mark.parametrize(
    ("part", "field", "shape", "message"),
    [
        ("router", "weight", (5, 8), r"router.weight must be \[4, 8\], got \[5, 8\]"),
        ("experts", "down", (4, 8, 5), r"experts.down must be \[4, 8, 6\], got \[4, 8, 5\]"),
        ("experts", "gate_up", (4, 11, 8), r"even number of rows, got \[4, 11, 8\]"),
        ("experts", "gate_up", (4, 12, 9), r"experts.gate_up must be \[E, 2\*I, 8\], got \[4, 12, 9\]"),
        ("personal", "gate_up", (7, 8), r"personal.gate_up stacks gate rows .* got \[7, 8\]"),
        ("personal", "down", (8, 3), r"personal.down must be \[8, 10\], got \[8, 3\]"),
        ("personal", "gate_weight", (7,), r"personal.gate_weight must be \[8\], got \[7\]"),
        ("personal", "gate_bias", (1,), r"personal.gate_bias must be \[\], got \[1\]"),
        ("shared", "down", (8, 13), r"shared.down must be \[8, 14\], got \[8, 13\]"),
        ("shared", "gate_weight", (8, 1), r"shared.gate_weight must be \[8\], got \[8, 1\]"),
    ],
)
def test_a_wrong_shape_is_named(case, part, field, shape, message):
    record = replace(getattr(case, part), **{field: torch.zeros(shape)})
    with pytest.raises(ValueError, match=message):
        call(case, **{part: record})


def test_experts_in_another_dtype_are_refused_outside_autocast(case):
    experts = replace(case.experts, down=case.experts.down.bfloat16())
    with pytest.raises(TypeError, match=r"experts.down is torch.bfloat16, but x is torch.float32"):
        call(case, experts=experts)


def test_an_integer_input_is_refused(case):
    with pytest.raises(TypeError, match=r"x must be a float tensor \[..., H\], got \[3, 8\] int64 on cpu"):
        call(case, x_TH=torch.zeros(3, 8, dtype=torch.int64))


def test_a_tensor_on_another_device_is_named(case):
    with pytest.raises(ValueError, match=r"router.weight is on meta, but x is on cpu"):
        call(case, router=replace(case.router, weight=case.router.weight.to("meta")))


@pytest.mark.parametrize(("option", "value"), [("mix", "sum"), ("save", "all")])
def test_an_unknown_option_lists_the_known_ones(case, option, value):
    with pytest.raises(ValueError, match=rf"{option}='{value}' is not one of '"):
        call(case, **{option: value})


def test_an_unknown_score_is_refused(case):
    with pytest.raises(ValueError, match=r"router.score='relu' is not one of 'softmax', 'sigmoid'"):
        call(case, router=replace(case.router, score="relu"))


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), r"routed.ids must be \[3, K\]"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), r"differ in shape"),
        (torch.zeros(3, 2), torch.zeros(3, 2), r"routed.ids must be int32 or int64"),
        (
            torch.zeros(3, 2, dtype=torch.int64),
            torch.zeros(3, 2, dtype=torch.int64),
            r"routed.weights must be a float",
        ),
    ],
)
def test_a_malformed_routing_decision_is_named(case, ids, weights, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(case, router=Routed(ids, weights))


def test_ids_beyond_the_sentinel_are_refused(case):
    ids = torch.tensor([[0, 1], [2, 5], [0, 1]])
    with pytest.raises(ValueError, match=r"routed.ids must lie in \[0, 4\] .* found 5"):
        call(case, router=Routed(ids, torch.ones(3, 2)))


def test_logits_of_a_routed_decision_are_refused(case):
    with pytest.raises(ValueError, match="return_router_logits=True needs a Router"):
        call(
            case,
            router=Routed(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)),
            return_router_logits=True,
        )


@pytest.mark.parametrize("part", ["experts", "personal", "shared", "router"])
def test_a_plain_tuple_is_not_a_record(case, part):
    with pytest.raises(TypeError, match=rf"{part} must be "):
        call(case, **{part: (1, 2)})


def test_an_unknown_backend_lists_the_known_ones(case):
    with pytest.raises(ValueError, match=r"backend='tpu' is not one of 'auto', 'reference', 'cpu'"):
        call(case, backend="tpu")


def test_float64_is_refused_by_a_fused_backend(case):
    with pytest.raises(
        ValueError, match=r"backend='cpu' computes in float32, bfloat16 or float16, x is torch.float64"
    ):
        flex_moe(*vars(case.to(torch.float64)).values(), backend="cpu")


def test_a_zero_sized_hidden_dimension_is_refused():
    with pytest.raises(ValueError, match="x must have at least one feature"):
        flex_moe(torch.zeros(3, 0), Router(torch.zeros(4, 0), 1), make_case().experts)


@pytest.mark.parametrize(
    "scale", ["a", None, True, float("nan"), float("inf"), -float("inf"), torch.tensor(2.0)]
)
def test_a_scale_that_is_no_finite_number_is_refused(case, scale):
    with pytest.raises(ValueError, match=r"router.scale must be a finite number, got "):
        call(case, router=replace(case.router, scale=scale))


def test_an_integer_and_a_float_scale_give_the_same(case):
    two, twice = (call(case, router=replace(case.router, scale=scale)) for scale in (2, 2.0))
    assert torch.equal(two, twice) and not torch.equal(two, call(case))


@pytest.mark.parametrize("normalize", ["yes", 1, None])
def test_normalize_must_be_a_bool(case, normalize):
    with pytest.raises(TypeError, match=rf"router.normalize must be True or False, got {normalize!r}"):
        call(case, router=replace(case.router, normalize=normalize))


def test_a_sparse_input_is_refused(case):
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got \[3, 8\] .* torch.sparse_coo"):
        call(case, x_TH=case.x_TH.to_sparse())

"""The loss: transformers' own number, the exact gradient, and no tensor of tokens times vocabulary.

Letters: N answer tokens, H hidden, V vocabulary.
"""

import pytest
import torch
from tiny import make_model
from tiny_models import ARCHITECTURES, tiny

from flex.attention import PACKED
from flex.batching import Example, pack
from flex.loss import answer_loss, linear_cross_entropy
from flex.models import packs


def problem(n: int = 13, h: int = 24, v: int = 101, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype), torch.randint(0, v, (n,))


def plain(hidden_NH, weight_VH, targets_N):
    return torch.nn.functional.cross_entropy((hidden_NH @ weight_VH.t()).double(), targets_N, reduction="sum")


@pytest.mark.parametrize("rows", [1, 5, 13, 1000])
def test_value_and_gradient_are_those_of_plain_torch(rows):
    hidden_NH, weight_VH, targets_N = problem()
    ours, theirs = (hidden_NH.clone().requires_grad_() for _ in range(2))
    loss = linear_cross_entropy(ours, weight_VH, targets_N, rows) * 0.7
    loss.backward()
    expected = plain(theirs, weight_VH, targets_N) * 0.7
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_low_precision_it_loses_no_more_than_plain_torch(dtype):
    hidden_NH, weight_VH, targets_N = problem(n=64, h=96, v=211)
    exact = hidden_NH.clone().requires_grad_()
    plain(exact, weight_VH, targets_N).backward()
    errors = []
    for function in (linear_cross_entropy, plain):
        low = hidden_NH.to(dtype).requires_grad_()
        function(low, weight_VH.to(dtype), targets_N).backward()
        errors.append((low.grad.double() - exact.grad).norm())
    assert errors[0] <= 2 * errors[1]


def test_no_answer_gives_zero_and_a_zero_gradient():
    _, weight_VH, _ = problem()
    hidden_NH = torch.zeros(0, 24, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden_NH, weight_VH, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden_NH.grad.shape == (0, 24)


def test_the_whole_logits_are_never_held():
    v, rows = 5000, 4
    hidden_NH, weight_VH, targets_N = problem(n=64, h=8, v=v, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # The output layer's own weight (and views of it) is the only larger thing there is.
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight_VH.data_ptr():
                largest = max(largest, out.numel())
            return out

    hidden_NH.requires_grad_()
    with Watch():
        linear_cross_entropy(hidden_NH, weight_VH, targets_N, rows).backward()
    assert largest == rows * v


def loss_of_each_alone(model, examples):
    """By transformers, which computes its loss in float32."""
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        total += model(ids, labels=labels).loss.item() * (len(example.ids) - example.start)
    return total


def test_a_packed_batch_gives_transformers_loss_of_every_example_alone():
    model = make_model().double()
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    torch.manual_seed(2)
    examples = [
        Example(torch.randint(4, 260, (n,)).tolist(), s)
        for n, s in [(7, 3), (12, 5), (3, 2), (5, 1), (20, 12)]
    ]
    expected = loss_of_each_alone(model, examples)
    batch = pack(examples, 24)
    assert len(batch.ids_BL) == 2
    assert answer_loss(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert sum(answer_loss(model, part).item() for part in batch.slices(1)) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_every_architecture_is_transformers_own_of_every_example_alone(architecture, attention):
    model = tiny(architecture).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    examples = [
        Example(torch.randint(3, 64, (n,), generator=generator).tolist(), s)
        for n, s in [(7, 3), (12, 5), (3, 2), (20, 12)]
    ]
    expected = loss_of_each_alone(model, examples)
    model.set_attn_implementation(attention)
    batch = pack(examples, 24, apart=not packs(model.config))
    assert len(batch.ids_BL) == (2 if packs(model.config) else 4)
    assert answer_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_through_the_model_equals_transformers():
    model = make_model()
    model.requires_grad_(False)
    model.set_experts_implementation("eager")
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    example = Example(list(range(4, 30)), 11)
    answer_loss(model, pack([example], 64)).backward()
    ours, weight.grad = weight.grad, None
    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, :11] = -100
    (model(ids, labels=labels).loss * 15).backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-5)


def test_a_trained_or_biased_output_layer_and_misfits_are_refused():
    hidden_NH, weight_VH, targets_N = problem()
    with pytest.raises(ValueError, match="weight_VH requires a gradient"):
        linear_cross_entropy(hidden_NH, weight_VH.requires_grad_(), targets_N)
    with pytest.raises(
        ValueError, match=r"hidden_NH \[13, 24\], weight_VH \[101, 23\] and targets_N \[13\] do not fit"
    ):
        linear_cross_entropy(hidden_NH, weight_VH.detach()[:, 1:], targets_N)
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 260)
    with pytest.raises(ValueError, match="output layer of MixtralForCausalLM has a bias"):
        answer_loss(model, pack([Example([4, 5], 1)], 8))

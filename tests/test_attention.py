"""Attention over packed rows, example by example, against transformers' own with its mask and against each
example alone.

Letters: B packed rows, L tokens in a packed row.
"""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny
from torch.nn.functional import scaled_dot_product_attention

from flex.attention import LONGEST_IN_FLOAT32, PACKED, causal_attention
from flex.batching import Batch, Example, example_lengths, pack
from flex.loss import answer_loss


def packed_batch(sizes: list[int], most: int) -> Batch:
    torch.manual_seed(3)
    return pack([Example(torch.randint(3, 60, (n,)).tolist(), 1) for n in sizes], most)


def loss_and_gradients(model, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = answer_loss(model, batch)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [[7, 12, 1, 20, 3, 12], [24, 24], [5]], ids=str)
def test_losses_and_gradients_are_those_of_the_masked_attention(name, sizes):
    model = tiny(name).double()
    model.get_output_embeddings().weight.requires_grad_(False)
    batch = packed_batch(sizes, 24)
    loss, gradients = {}, {}
    for implementation in ("sdpa", PACKED):
        model.set_attn_implementation(implementation)
        loss[implementation], gradients[implementation] = loss_and_gradients(model, batch)
    assert loss[PACKED] == pytest.approx(loss["sdpa"], rel=1e-9)
    assert len(gradients[PACKED]) == len(gradients["sdpa"]) > 0
    for ours, theirs in zip(gradients[PACKED], gradients["sdpa"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_an_example_does_not_see_the_others_of_its_row():
    model = tiny("mixtral").double()
    model.set_attn_implementation(PACKED)
    batch = packed_batch([9, 6, 8], 24)
    changed = batch.ids_BL.clone()
    first = batch.lengths[0][0]
    changed[0, :first] = 3 + (changed[0, :first] + 1) % 50
    with torch.no_grad():
        before, after = (
            model.base_model(
                input_ids=ids_BL,
                position_ids=batch.positions_BL,
                example_lengths=batch.lengths,
                use_cache=False,
            ).last_hidden_state
            for ids_BL in (batch.ids_BL, changed)
        )
    assert not torch.equal(before[0, :first], after[0, :first])
    torch.testing.assert_close(before[0, first:], after[0, first:], rtol=0, atol=0)


def test_a_window_shorter_than_an_example_keeps_its_mask():
    model = tiny("mixtral", sliding_window=4).double()
    batch = packed_batch([9, 6, 8], 24)
    model.get_output_embeddings().weight.requires_grad_(False)
    losses = []
    for implementation in ("sdpa", PACKED):
        model.set_attn_implementation(implementation)
        losses.append(answer_loss(model, batch).item())
    wide = tiny("mixtral").double()
    wide.load_state_dict(model.state_dict())
    wide.get_output_embeddings().weight.requires_grad_(False)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[1] != pytest.approx(answer_loss(wide, batch).item(), rel=1e-6)


def test_calls_without_lengths_are_transformers_sdpa():
    model = tiny("mixtral").double().eval()
    ids_BL = torch.randint(3, 60, (2, 11))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 7:] = 0
    outputs = []
    for implementation in ("sdpa", PACKED):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(input_ids=ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


def test_checkpointing_passes_the_lengths_on():
    model = tiny("mixtral").double().train()
    model.get_output_embeddings().weight.requires_grad_(False)
    model.set_attn_implementation(PACKED)
    batch = packed_batch([9, 6, 8], 24)
    loss, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-12)
    for ours, theirs in zip(recomputed, gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [LONGEST_IN_FLOAT32, LONGEST_IN_FLOAT32 + 1])
def test_bfloat16_is_near_float64(tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 16).bfloat16() for heads in (6, 2, 2))
    out = causal_attention(query, key, value, 0.0, None)
    assert out.dtype == torch.bfloat16
    wide = scaled_dot_product_attention(
        query.double(),
        key.double().repeat_interleave(3, 1),
        value.double().repeat_interleave(3, 1),
        is_causal=True,
    )
    torch.testing.assert_close(out.double(), wide, rtol=0.02, atol=0.02)


def test_lengths_of_rows_by_hand():
    positions_BL = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]])
    assert example_lengths(positions_BL) == ((3, 1, 2), (6,), (1, 1, 2, 2))

"""Error feedback through a model: each layer by what it then sees, and what is left behind.

Letters: n tokens that chose an expert, H hidden, I expert width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, padded, tiny, tokens

import flex
from flex.block import grafted_blocks
from flex.feedback import together, vocabulary_of
from flex.models import find_blocks
from flex.quantized import kind_of
from flex.select import watch_batches
from flex_kernels.quantize import quantize
from flex_kernels.reference import route


def codes_of(model):
    return {name: t for name, t in model.state_dict().items() if name.endswith((".codes", ".scales"))}


def test_each_layer_is_rounded_by_what_the_rounded_layers_before_it_give_it():
    batches = [tokens(2, 9, seed) for seed in range(3)]
    model = tiny("mixtral")
    flex.gptq(model, batches)
    # The rounded model's own run: what enters a layer no longer depends on that layer.
    seen = {}
    watch_batches(model, [torch.cat(batches)], find_blocks(model), lambda _, name, x: seen.update({name: x}))
    for name, (block, adapter) in find_blocks(tiny("mixtral")).items():
        ids_TK = route(seen[name], adapter.router(block))[0]
        held = find_blocks(model)[name][1].experts(model.get_submodule(name))
        for e in range(held.count):
            gate_up, down = adapter.experts(block).expert(e)
            x_nH = seen[name][(ids_TK == e).any(-1)]
            gate_nI, up_nI = (x_nH @ held.gate_up[e].dequantize().T).chunk(2, -1)
            for weight, inputs, got in (
                (gate_up, x_nH, held.gate_up[e]),
                (down, F.silu(gate_nI) * up_nI, held.down[e]),
            ):
                want = quantize(weight.detach(), "nf4", inputs.T @ inputs / max(1, len(inputs)))
                torch.testing.assert_close(got.scales.float(), want.scales.float(), rtol=0.02, atol=0)
                assert (got.codes == want.codes).double().mean() > 0.98


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_left_is_saved_loaded_and_grafted_as_it_is(architecture, tmp_path):
    model = tiny(architecture).train()
    flex.gptq(model, [tokens(2, 9), tokens(1, 5)])
    assert model.training and kind_of(a.experts(b) for b, a in find_blocks(model).values()) == "nf4"
    ids = tokens()
    with torch.no_grad():
        before = model.eval()(ids).logits
    with pytest.raises(ValueError, match=r"flex\.save"):
        model.save_pretrained(tmp_path / "refused")
    flex.save(model, tmp_path / "saved")
    flex.graft(model, personal=None)
    again = flex.load(tmp_path / "saved")
    assert len(grafted_blocks(model)) and codes_of(again).keys() == codes_of(model).keys()
    assert all(torch.equal(t, codes_of(model)[name]) for name, t in codes_of(again).items())
    with torch.no_grad():
        for other in (model, again):
            torch.testing.assert_close(other(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_batches_of_other_lengths_with_padding_are_seen_as_they_are():
    mixed = [tokens(2, 9), padded(2, 7), tokens(1, 12)[0]]
    whole = together(mixed, vocabulary_of(tiny("mixtral")))
    assert whole["input_ids"].shape == whole["attention_mask"].shape == (5, 12)
    assert whole["attention_mask"].sum() == 2 * 9 + 2 * 7 - 4 + 12
    seen = []
    for batches in (mixed, [whole]):
        model, parts = tiny("mixtral"), {}
        watch_batches(
            model, batches, find_blocks(model), lambda _, name, x, p=parts: p.setdefault(name, []).append(x)
        )
        seen.append({name: torch.cat(some) for name, some in parts.items()})
    for name, x_TH in seen[0].items():
        torch.testing.assert_close(seen[1][name], x_TH, rtol=1e-4, atol=1e-5)


def test_positions_that_some_batches_give_are_counted_for_the_others():
    placed = {"input_ids": tokens(1, 4), "position_ids": torch.arange(4)[None] + 3}
    whole = together([placed, tokens(1, 6)], vocabulary_of(tiny("mixtral")))
    assert whole["position_ids"].tolist() == [[3, 4, 5, 6, 0, 0], [0, 1, 2, 3, 4, 5]]
    whole = together([tokens(2, 4), tokens(1, 4)], vocabulary_of(tiny("mixtral")))
    assert "attention_mask" not in whole


def test_the_same_batches_give_the_same_bits_and_others_do_not():
    models = [tiny("qwen2_moe") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        flex.gptq(model, [tokens(2, 9, seed)])
    first, second, third = map(codes_of, models)
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert any(not torch.equal(t, third[name]) for name, t in first.items())


@pytest.mark.parametrize(
    "change, batches, error, message",
    [
        (lambda m: flex.graft(m, personal=None), [tokens()], ValueError, "grafted already"),
        (lambda m: flex.gptq(m, [tokens()]), [tokens()], ValueError, "quantised already, to 'nf4'"),
        (lambda m: None, [], ValueError, "calibration holds no batch"),
        (lambda m: None, tokens(), TypeError, "put it in a list"),
        (lambda m: None, [tokens(), tokens().float()], ValueError, "calibration batch 1: input_ids"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changed(change, batches, error, message):
    model = tiny("mixtral")
    change(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        flex.gptq(model, batches)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_that_is_none_is_named():
    with pytest.raises(TypeError, match="model must be a loaded Hugging Face model, got str"):
        flex.gptq("mixtral", [tokens()])


def test_a_layer_that_sees_infinities_is_named():
    model = tiny("qwen2_moe")
    last = list(find_blocks(model))[-1]
    with torch.no_grad():
        model.get_submodule(last).experts.gate_up_proj.fill_(1e29)
    with pytest.raises(ValueError, match=rf"layer {last} or of its experts' down projections are not finite"):
        flex.gptq(model, [tokens()])

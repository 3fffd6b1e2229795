"""Error feedback while a checkpoint is read: the bits of rounding the model in memory, without holding it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import FUSED, HUB, grafted, loading_takes, same_bits, saved
from tiny_models import ARCHITECTURES, padded, tokens
from transformers import AutoModelForCausalLM

import flex
from flex import loading
from flex.deferred import defer_experts
from flex.models import find_blocks
from flex.shared_experts import quantize_shared

BATCHES = [tokens(2, 9), padded(2, 7)]


def rounded_in_memory(folder, dtype=None, shared=None):
    """The measure: the whole model in full precision first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if shared is not None:
        for block, adapter in find_blocks(model).values():
            quantize_shared(block, adapter.shared, shared)
    flex.gptq(model, BATCHES)
    return grafted(model)


@pytest.mark.parametrize("layout", [HUB, FUSED])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_both_layouts_loads_to_the_bits_of_rounding_it_in_memory(
    architecture, layout, tmp_path
):
    saved(tmp_path, architecture, layout)
    model = flex.load(tmp_path, "nf4", gptq=iter(BATCHES))
    same_bits(grafted(model), rounded_in_memory(tmp_path))
    nearest = flex.load(tmp_path, "nf4").state_dict()
    assert any(not torch.equal(t, nearest[name]) for name, t in model.state_dict().items())


def test_another_dtype_and_quantised_shared_experts_come_before_rounding(tmp_path):
    saved(tmp_path, "qwen2_moe")
    model = flex.load(tmp_path, "nf4", torch.bfloat16, shared_experts="int8", gptq=BATCHES)
    same_bits(grafted(model), rounded_in_memory(tmp_path, torch.bfloat16, "int8"))


def test_what_was_loaded_so_is_saved_and_loaded_again(tmp_path):
    model = flex.load(saved(tmp_path / "plain", max_shard_size="40KB"), "nf4", gptq=BATCHES)
    flex.save(model, tmp_path / "nf4")
    same_bits(flex.load(tmp_path / "nf4"), model)


@pytest.mark.parametrize("batches, error, message", [
    ([], ValueError, "calibration holds no batch"),
    (tokens(), TypeError, "put it in a list"),
    ([tokens(), tokens().float()], ValueError, "calibration batch 1: input_ids"),
    ([tokens() + 10**6], ValueError, "calibration batch 0: token ids run from"),
])  # fmt: skip
def test_batches_that_do_not_fit_are_refused_before_anything_is_read(
    batches, error, message, tmp_path, monkeypatch
):
    saved(tmp_path)
    monkeypatch.setattr(loading, "open_shards", lambda files: pytest.fail("opened"))
    with pytest.raises(error, match=message):
        flex.load(tmp_path, "nf4", gptq=batches)


def test_batches_without_use_are_refused(tmp_path):
    saved(tmp_path / "plain")
    for kind in ("int8", None):
        with pytest.raises(ValueError, match=rf"gptq is for a plain .* experts={kind!r}: leave it out"):
            flex.load(tmp_path / "plain", kind, gptq=BATCHES)
    with pytest.raises(ValueError, match="importance and gptq are two ways"):
        flex.load(tmp_path / "plain", "nf4", importance={}, gptq=BATCHES)
    flex.save(flex.load(tmp_path / "plain", "nf4"), tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"gptq is for a plain .*nf4 is quantised already"):
        flex.load(tmp_path / "nf4", "nf4", gptq=BATCHES)


def changed(folder, name, value):
    """The checkpoint in ``folder`` with another tensor in the place of one."""
    tensors = load_file(folder / "model.safetensors")
    assert name in tensors
    save_file(tensors | {name: value}, folder / "model.safetensors", {"format": "pt"})


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    name = "model.layers.1.mlp.experts.down_proj"
    weight = load_file(saved(tmp_path, layout=FUSED) / "model.safetensors")[name]
    weight[2, 0, 0] = torch.nan
    changed(tmp_path, name, weight)
    with pytest.raises(ValueError, match=r"down of expert 2 of layer model\.layers\.1\.mlp has values"):
        flex.load(tmp_path, "nf4", gptq=BATCHES)


def test_an_expert_of_another_shape_or_type_is_named(tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    weight = load_file(saved(tmp_path / "hub") / "model.safetensors")[name]
    changed(tmp_path / "hub", name, weight.to(torch.int32))
    with pytest.raises(ValueError, match=rf"{name} is I32, not one of F64"):
        flex.load(tmp_path / "hub", "nf4", gptq=BATCHES)
    changed(tmp_path / "hub", name, weight[:-1].contiguous())
    with pytest.raises(ValueError, match="its tensors do not fit MixtralConfig"):
        flex.load(tmp_path / "hub", "nf4", gptq=BATCHES)
    name = "model.layers.0.mlp.experts.down_proj"
    weight = load_file(saved(tmp_path / "fused", layout=FUSED) / "model.safetensors")[name]
    changed(tmp_path / "fused", name, weight[:, :-1].contiguous())
    with pytest.raises(ValueError, match=rf"{name}: the files have \["):
        flex.load(tmp_path / "fused", "nf4", gptq=BATCHES)


class Slice:
    """A stored tensor that counts how often it is read."""

    def __init__(self, tensor):
        self.tensor, self.reads = tensor, 0

    def __getitem__(self, index):
        self.reads += 1
        return self.tensor[index]

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        return "F32"


def test_what_is_done_to_deferred_tensors_is_done_when_they_are_read():
    stored = {f"mlp.experts.{e}.w": Slice(torch.randn(3, 4)) for e in range(2)}
    stored["mlp.shared_experts.w"] = Slice(torch.randn(2))
    tensors = defer_experts(stored, [".absent.", ".experts."])
    assert tensors["mlp.shared_experts.w"] is stored["mlp.shared_experts.w"]
    one, two = (tensors[f"mlp.experts.{e}.w"][...].to(dtype=torch.float16) for e in range(2))
    joined = torch.cat([torch.stack([one, two]), torch.stack(tensors=(two, one), dim=0)], dim=1)[1:]
    assert joined.shape == (1, 6, 4) and joined.dtype == torch.float16
    assert not any(held.reads for held in stored.values())
    a, b = (stored[f"mlp.experts.{e}.w"].tensor.half() for e in range(2))
    assert torch.equal(joined.read(), torch.cat([b, a])[None])
    assert stored["mlp.experts.0.w"].reads == 2
    with pytest.raises(TypeError, match="gives no tensor"):
        torch.is_floating_point(joined)


def test_the_whole_model_is_never_in_memory(tmp_path):
    peak, held, full = loading_takes(tmp_path, "dict(gptq=[torch.arange(64)[None]])")
    # Above what stays: the float experts of one layer, and the second moments of an expert with their factor.
    assert held < peak < 0.8 * full

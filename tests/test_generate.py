"""flex.generate: answers of a model and of a run's clients, with and without the personal experts."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny, tiny_config, write_rows

import flex
from flex import cli
from flex.generate import known_client, open_writer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder and a run in which every client learnt, with large steps, to repeat its own letter."""
    folder = tmp_path_factory.mktemp("generate")
    model = save_tiny(folder / "model")
    rows = write_rows(folder / "rows.jsonl", {"anna": 16, "bert": 16})
    config = tiny_config(
        model,
        rows,
        folder / "run",
        federation={"rounds": 1},
        training={
            "local_steps": 12,
            "batch_size": 8,
            "personal_learning_rate": 0.1,
            "gate_learning_rate": 0.1,
            "learning_rate": 0.03,
        },
        evaluation={"generate": False, "before": False},
    )
    flex.run(config)
    return folder


def test_a_model_folder_answers_as_transformers_does(place):
    from transformers import AutoModelForCausalLM

    writer = open_writer(str(place / "model"))
    assert not writer.personal
    answer = writer.answer("say a 1", max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="bfloat16")
    turns = [{"role": "user", "content": "say a 1"}]
    text = writer.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = writer.tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert answer == writer.tokenizer.decode(out, skip_special_tokens=True)


def test_each_client_answers_with_its_own_experts(place):
    answers = {name: open_writer(str(place / "run"), name).answer("say a 1", 4) for name in ("anna", "bert")}
    assert "a" in answers["anna"] and "b" not in answers["anna"]
    assert "b" in answers["bert"] and "a" not in answers["bert"]


def test_with_the_gates_shut_no_client_is_heard(place):
    answers = [
        open_writer(str(place / "run"), name).answer("say a 1", 4, without_personal=True)
        for name in ("anna", "bert")
    ]
    assert answers[0] == answers[1]


def test_the_pieces_make_up_the_answer(place):
    pieces: list[str] = []
    answer = open_writer(str(place / "run"), "anna").answer("say a 1", 4, on_text=pieces.append)
    assert answer == "".join(pieces)
    assert answer


def test_sampling_depends_on_its_seed_alone(place):
    writer = open_writer(str(place / "model"))
    first = writer.answer("say a 1", 12, temperature=2.0, seed=1)
    state = torch.random.get_rng_state()
    assert writer.answer("say a 1", 12, temperature=2.0, seed=1) == first
    assert writer.answer("say a 1", 12, temperature=2.0, seed=2) != first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction": "  "}, "the prompt is empty"),
        ({"instruction": "a", "temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"instruction": "a", "temperature": float("nan")}, "temperature=nan must be at least 0, and finite"),
        ({"instruction": "a", "temperature": float("inf")}, "temperature=inf must be at least 0, and finite"),
        ({"instruction": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_impossible_arguments_are_named(place, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_writer(str(place / "model")).answer(**arguments)


def test_a_run_needs_the_name_of_a_client(place):
    with pytest.raises(ValueError, match="name one of its clients: anna, bert"):
        open_writer(str(place / "run"))


def test_a_client_needs_a_run(place):
    with pytest.raises(ValueError, match=r"is not a run: there is no config\.toml"):
        open_writer(str(place / "model"), "anna")


def test_an_unknown_client_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no client is called 'bart'; did you mean 'bert'\? \(anna, bert\)"):
        known_client("bart", ["anna", "bert"])


def test_a_folder_that_is_neither_run_nor_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        open_writer(str(tmp_path))


def test_the_command_compares_with_and_without(place, capsys):
    run = str(place / "run")
    assert (
        cli.main(["generate", run, "--client", "bert", "say a 1", "--compare", "--max-new-tokens", "4"]) == 0
    )
    out = capsys.readouterr().out
    own, _, shut = out.partition("== without the personal experts\n")
    assert own.startswith("== bert\n") and "b" in own.removeprefix("== bert\n")
    assert shut.strip() != own.removeprefix("== bert\n").strip()


def test_comparing_needs_personal_experts(place, capsys):
    assert cli.main(["generate", str(place / "model"), "hello", "--compare"]) == 2
    assert "has no personal experts to leave out" in capsys.readouterr().err

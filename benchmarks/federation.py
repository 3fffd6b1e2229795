"""Seconds and peak memory of a federated round as the number of simulated clients grows.

    python benchmarks/federation.py --out benchmarks/results/federation.json
    python benchmarks/federation.py --quick

A tiny random Mixtral is trained with FLEx for one round by 4, 64 and 1,000 clients, each with its own
personal experts in the store on disk. Every size runs in a fresh process, so that one does not inherit the
other's memory. Reported: seconds of the whole round (selection, steps, store and commit), and resident memory
before the round, at its peak and after it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES, QUICK_SIZES = (4, 64, 1000), (2, 8)
ROWS_PER_CLIENT = 8


def measure(clients: int, folder: Path) -> dict[str, float]:
    """One round of ``clients`` clients in this process."""
    import psutil
    import torch

    from flex.config import Config
    from flex.data import load_clients
    from flex.history import History
    from flex.memory import PeakMemory
    from flex.server import Server
    from flex.session import load_session
    from flex.store import Store
    from flex.strategies.base import size_in_bytes

    torch.set_num_threads(1)
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", clients)
    config = Config.from_dict(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {
                "source": "jsonl",
                "path": str(folder / "rows.jsonl"),
                "max_length": 64,
                "held_out": 0.25,
            },
            "federation": {"rounds": 2, "strategy": "flex"},
            "training": {"local_steps": 2, "batch_size": 4},
            "shared": {"rank": 4},
            "run": {"folder": str(folder / "run"), "threads": 1},
        }
    )
    store = Store(folder / "run")
    session = load_session(config, load_clients(config), store)
    store.create(config.to_toml(), {})
    history = History(store.history)
    server = Server(session, history)
    store.save_shared(0, session.shared)
    store.commit(0, True, history.sync())
    process = psutil.Process()
    before = process.memory_info().rss
    peak = PeakMemory()
    began = time.perf_counter()
    server.train_round(1)
    seconds = time.perf_counter() - began
    history.close()
    kept = size_in_bytes(store.load_client("client-0000") or {})
    return {
        "clients": clients,
        "seconds_round": seconds,
        "seconds_client": seconds / clients,
        "rss_before_bytes": before,
        "rss_peak_bytes": peak.read(),
        "rss_after_bytes": process.memory_info().rss,
        "personal_state_bytes": kept,
        "all_personal_states_bytes": kept * clients,
    }


def save_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
    }
    MixtralForCausalLM(MixtralConfig(**settings)).save_pretrained(folder)


def write_rows(path: Path, clients: int) -> None:
    with open(path, "w") as out:
        for c in range(clients):
            for i in range(ROWS_PER_CLIENT):
                row = {"instruction": f"count {c} {i}", "output": str(c + i), "client": f"client-{c:04d}"}
                out.write(json.dumps(row) + "\n")


def in_fresh_process(clients: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--measure", str(clients), folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"the measurement of {clients} clients failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, object]:
    import torch
    import transformers

    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(os.devnull) as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 and 8 clients, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--measure", nargs=2, metavar=("CLIENTS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(int(arguments.measure[0]), Path(arguments.measure[1]))))
        return
    results = []
    for clients in QUICK_SIZES if arguments.quick else SIZES:
        result = in_fresh_process(clients)
        results.append(result)
        print(
            f"{clients:5d} clients: {result['seconds_round']:8.1f} s a round, "
            f"{result['seconds_client'] * 1000:6.0f} ms a client, resident memory "
            f"{result['rss_before_bytes'] / 2**20:.0f} MiB before, "
            f"{result['rss_peak_bytes'] / 2**20:.0f} MiB peak "
            f"({result['all_personal_states_bytes'] / 2**20:.1f} MiB of personal state on disk)",
            flush=True,
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"environment": environment(), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""What is shipped: whole source distributions, extras that serve the tests, packages that depend one way."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower() for text in requirements}


def test_a_source_distribution_holds_every_file_that_the_extensions_are_compiled_from(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    # Without the CUDA compiler setup.py itself names no CUDA source: a user's machine may have one.
    environment = {**os.environ, "FLEX_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    listed = set((tmp_path / "flex_kernels.egg-info" / "SOURCES.txt").read_text().split())
    csrc = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in csrc} == {".cpp", ".cu", ".h", ".cuh"}
    assert csrc | {"setup.py", "pyproject.toml", "LICENSE", "flex/moefication/chats.jsonl"} <= listed


def test_the_dev_extra_holds_every_pinned_requirement_of_the_tests():
    pinned = (ROOT / "requirements" / "dev.txt").read_text().partition("# tests\n")[2].splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert names(pinned) and names(pinned) <= names(extras["dev"])


def test_importing_the_layer_loads_neither_the_federated_part_nor_transformers():
    unwanted = "{'flex', 'transformers', 'peft'} & {m.split('.')[0] for m in sys.modules}"
    code = f"import sys, flex_kernels; print(*{unwanted})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "flex_kernels").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_no_module_of_the_layer_imports_the_federated_part(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add((node.module or "").split(".")[0])
    assert not imported & {"flex", "transformers", "peft"}

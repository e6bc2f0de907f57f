"""The repository's shape: Python's own ssl stays visible, imports go one way, help is quick to import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretext import TASKS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("how", [["-c"], ["-I", "-c"]])
def test_pythons_own_ssl_at_the_repository_root(how: list[str]):
    code = "import ssl; ssl.create_default_context(); print(ssl.__file__)"
    done = subprocess.run([sys.executable, *how, code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout.replace(sys.prefix, "")
    assert not (ROOT / "ssl" / "__init__.py").exists()


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_with_torch_is_used(variable: str, tmp_path: Path):
    """The scripts take its Python, and make no .venv of their own beside them."""
    scripts = tmp_path / "clone" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("_venv", "test"):
        (scripts / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (tmp_path / "clone" / "pyproject.toml").touch()
    python = tmp_path / "active" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # It records what it is asked to run, and has torch.
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$2" in *sys.prefix*) echo {tmp_path};; esac\n')
    python.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    done = subprocess.run(
        ["bash", str(scripts / "test"), "-k", "x"],
        env={**clean, variable: str(tmp_path / "active")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "-m pip install --quiet --editable .[test]" in asked
    assert not any("pip install --quiet torch" in line for line in asked)
    assert asked[-1] == "-m pytest -n 2 --dist loadfile -k x"
    assert not (tmp_path / "clone" / ".venv").exists()


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_go_one_way():
    for path in (ROOT / "ssl" / "unlabel").glob("*.py"):
        parts = {m.split(".")[0] for m in imports(path)} & {"pretext", "downstream"}
        # pretrain.py and batches.py take the contract (Batch, load_task) from pretext, lazily.
        allowed = {"cli": {"pretext", "downstream"}, "compare": {"pretext", "downstream"}, "__init__": {"pretext"}}
        allowed |= {"pretrain": {"pretext"}, "batches": {"pretext"}}
        assert parts <= allowed.get(path.stem, set()), path
    for path in (ROOT / "pretext").glob("*.py"):
        assert "downstream" not in {m.split(".")[0] for m in imports(path)}, path
    for path in (ROOT / "downstream").glob("*.py"):
        assert "pretext" not in {m.split(".")[0] for m in imports(path)}, path


def test_help_and_list_import_nothing_heavy():
    code = "import sys; from unlabel.cli import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    for arguments in (["--help"], ["list"], ["pretrain", "nonesuch", "--data", "x", "--out", "y"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        loaded = set(done.stdout.splitlines()[-1].split())
        assert loaded.isdisjoint({"torch", "timm", "sklearn", "torchvision"}), arguments


def test_torch_load_only_in_checkpoint():
    pattern = re.compile(r"torch\.load\(")
    users = [p.name for d in ("ssl", "pretext", "downstream", "scripts") for p in (ROOT / d).rglob("*.py") if pattern.search(p.read_text())]  # noqa: E501  # fmt: skip
    assert users == ["checkpoint.py"]


def test_contributing_agrees_with_the_tree_and_its_snippet_runs(tmp_path: Path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:ssl|pretext|downstream|tests|scripts)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippet.splitlines()) <= 40
    assert set(TASKS) <= set(re.findall(r"[a-z]+", (ROOT / "README.md").read_text()))
    (tmp_path / "flip_task.py").write_text(snippet)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import pretext; pretext.TASKS["flip"] = ("flip_task:Flip", "was it mirrored?")
from unlabel.cli import main
sys.exit(main(["pretrain", "flip", "--data", "digits", "--image-size", "32", "--epochs", "0.2", "--flip.dropout", "0.1",
               "--out", {str(tmp_path / "run")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "backbone.safetensors").exists()

"""Packaging: wheels and source distribution contain only tracked files and work in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from project import ROOT

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = sorted(PROJECT["scripts"])
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf", "safetensors")

DATA = {"py.typed", ".tcss", ".html", ".css", ".js", ".svg", ".txt", ".json"}


def run(*words: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program outside this checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == code, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks or would track, without builds, caches and egg-info."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    folder = tmp_path_factory.mktemp("tree") / "llm-edge"
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def contents(wheel: Path) -> set[str]:
    """The files of a wheel; its metadata folder is called `info`."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.replace(f"{info_of(wheel)}/", "info/") for name in archive.namelist()}


def info_of(wheel: Path) -> str:
    return f"llm_edge-{wheel.name.split('-')[1]}.dist-info"


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path, tree: Path) -> None:
    wanted = set()
    for folder in FOLDERS:
        for path in (tree / folder).rglob("*"):
            if path.suffix == ".py" or path.suffix in DATA or path.name in DATA:
                wanted.add(f"llm_edge/{path.relative_to(tree)}")
    found = {name for name in contents(wheel) if name.startswith("llm_edge/")}
    assert wanted - found == set()
    assert {name for name in found - wanted if not name.endswith(".md")} == set()
    for folder in FOLDERS:
        assert f"llm_edge/{folder}/py.typed" in found
    assert {f"llm_edge/exporter/data/{name}/prose.txt" for name in ("calibration", "probes", "validation")} <= found
    assert "llm_edge/__init__.py" not in found  # a namespace package
    others = {name for name in contents(wheel) - found if not name.startswith("info/")}
    assert others == set()  # no tests, no docs, no top-level `runtime` that would collide with other distributions


def test_the_wheel_has_correct_metadata(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = info_of(wheel)
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entries = archive.read(f"{info}/entry_points.txt").decode()
        license_text = archive.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Name"] == "llm-edge"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert license_text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(PROJECT["dependencies"])
    names = {line.split(">")[0].split("[")[0].strip().replace("-", "_") for line in needed}
    assert names & set(HEAVY) == set()
    for command, entry in PROJECT["scripts"].items():
        assert f"{command} = {entry}" in entries


def test_a_wheel_built_directly_is_identical(wheel: Path, tree: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    assert direct.name == wheel.name
    assert contents(direct) == contents(wheel)
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(wheel) as other:
        for name in one.namelist():
            if not name.endswith("RECORD"):
                assert one.read(name) == other.read(name), name


def test_the_source_distribution_can_be_built_and_read(dist: Path, tree: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    texts = ("exporter/data/calibration/prose.txt", "exporter/data/validation/chat.json")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", *texts, "runtime/py.typed"):
        assert name in names
    sources = {str(path.relative_to(tree)) for folder in FOLDERS for path in (tree / folder).rglob("*.py")}
    assert sources <= names


# ---- installed


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with only the base install."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    scripts = folder / "venv" / "bin"
    words = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
    run(scripts / "python", *words, cwd=folder)
    return scripts


def test_the_base_install_has_no_training_or_export_library(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, json
import llm_edge.runtime
print(json.dumps([llm_edge.runtime.__file__, [name for name in {HEAVY} if importlib.util.find_spec(name)]]))
"""
    where, found = json.loads(run(installed / "python", "-c", code, cwd=tmp_path).stdout)
    assert found == []
    assert where.startswith(str(installed.parent))
    run(installed / "python", "-m", "pip", "check", cwd=tmp_path)


def test_the_base_install_generates_an_answer(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    code = f"""
from llm_edge.runtime import Model, SamplingParams
model = Model.load({str(tiny_bundle)!r}, precision="int4")
result = model.chat([{{"role": "user", "content": "Hi"}}], SamplingParams(temperature=0.0, max_tokens=5)).result()
print(len(result.tokens), result.finish_reason)
"""
    count, reason = run(installed / "python", "-W", "error", "-c", code, cwd=tmp_path).stdout.split()
    assert (count, reason) == ("5", "length") or reason == "stop"


def test_the_commands_of_the_base_install_work(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for command in COMMANDS:
        assert "Usage:" in run(installed / command, "--help", cwd=tmp_path).stdout
    options = ("--temperature", "0", "--max-tokens", "5")
    done = run(installed / "llm-chat", tiny_bundle, "--ask", "hi", *options, cwd=tmp_path)
    assert done.stdout
    assert done.stderr in ("", "(the answer was cut off after 5 tokens: raise --max-tokens)\n")
    done = run(installed / "llm-export", "smollm2", "--progress", "none", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: llm-export needs ")
    assert re.search(r": pip install '(llm-edge|/\S+\.whl)\[export\]'$", done.stderr.rstrip())
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_editable_install_can_be_imported(installed: Path, tree: Path, tmp_path: Path) -> None:
    """Runs last, because it replaces the wheel."""
    words = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--editable", tree)
    run(installed / "python", *words, cwd=tmp_path)
    code = """
import llm_edge.bench.cli, llm_edge.exporter.cli, llm_edge.runtime.bundle, llm_edge.tui.cli
print(llm_edge.runtime.__file__)
"""
    assert run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip() == str(tree / "runtime" / "__init__.py")
    assert "Usage:" in run(installed / "llm-chat", "--help", cwd=tmp_path).stdout

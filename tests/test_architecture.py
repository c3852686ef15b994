"""Allowed imports between packages, checked in the sources and in fresh processes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

TORCH_SIDE = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf", "safetensors", "huggingface_hub")
SCREENS = ("textual", "fastapi", "starlette", "uvicorn")

# package -> packages that it may import besides itself; a set restricts the import to these modules
ALLOWED: dict[str, dict[str, set[str] | None]] = {
    "runtime": {},
    "model": {"runtime": {"errors", "safe_io"}},
    # runtime.text checks tokenizers of checkpoints; runtime.sampling says what a generation_config.json means.
    "checkpoint": {
        "model": None,
        "runtime": {"bundle", "errors", "installation", "safe_io", "safe_yaml", "sampling", "text", "user_cache"},
    },
    # runtime.bundle defines the folder format; runtime.backend runs graphs for validation.
    "exporter": {
        "model": None,
        "checkpoint": None,
        "runtime": {
            "backend",
            "bundle",
            "command",
            "errors",
            "file_lock",
            "installation",
            "model_shape",
            "safe_io",
            "text",
        },
    },
    "finetune": {"model": None, "checkpoint": None, "runtime": None},
    # The chat runs llm-export as a process, with these options.
    "chat": {"exporter": {"options"}, "runtime": None},
    "tui": {"chat": None, "exporter": {"options"}, "runtime": None},
    "server": {"chat": None, "exporter": {"options"}, "runtime": None},
    "bench": {"finetune": None, "checkpoint": None, "runtime": None},
}

# libraries that a package must not load, even indirectly, when all its modules are imported
FORBIDDEN = {
    "runtime": (*TORCH_SIDE, *SCREENS, "typer", "rich"),
    "model": (*SCREENS, "onnxruntime", "transformers"),
    "checkpoint": (*SCREENS, "onnxruntime", "transformers"),
    "exporter": (*SCREENS, "transformers"),
    "chat": (*TORCH_SIDE, *SCREENS),
    "tui": TORCH_SIDE,
    "server": TORCH_SIDE,
    "bench": (*TORCH_SIDE, *SCREENS),
}

PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))


def modules(package: str) -> list[str]:
    """Full names of all modules of a package, except those for other engines and those that need transformers."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(("llm_edge", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if not name.endswith("genai_worker") and not name.startswith("llm_edge.exporter.general"):
            found.append(name)
    return found


def python(code: str) -> str:
    """The output of code in a new Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(package: str) -> set[str]:
    """Names in sys.modules once every module of a package has been imported."""
    code = f"import importlib, json, sys\nfor name in {modules(package)}: importlib.import_module(name)\n"
    names: list[str] = json.loads(python(code + "print(json.dumps(list(sys.modules)))"))
    return set(names)


def imports(path: Path) -> Iterator[str]:
    """Our modules that a source file imports anywhere, as `package.module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(path: Path) -> set[tuple[str, str]]:
    """(package, module) of each import of ours; the module is "" where the package itself is imported."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "llm_edge":
            rest = parts[2:]
            module = rest[0] if rest and is_module(parts[1], rest[0]) else ""
            found.add((parts[1], module))
    return found


def is_module(package: str, name: str) -> bool:
    folder = ROOT / package / name
    return folder.is_dir() or folder.with_suffix(".py").exists()


def test_the_tables_above_match_the_folders() -> None:
    assert set(PACKAGES) <= ALLOWED.keys()
    assert {"exporter", "runtime", "tui"} <= set(PACKAGES)
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "llm_edge").iterdir()}
    assert links == {name: ROOT / name for name in PACKAGES}  # so that type checkers and editors find them
    for names_by_package in ALLOWED.values():
        for other, names in names_by_package.items():
            assert names is None or all(is_module(other, name) for name in names)
    # check that imports are found at all
    assert ("runtime", "errors") in ours(ROOT / "exporter" / "export.py")
    assert ("runtime", "model") in ours(ROOT / "chat" / "choice.py")  # inside a function


@pytest.mark.parametrize("package", PACKAGES)
def test_sources_import_only_what_is_allowed(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for other, module in ours(path) - {(package, module) for _, module in ours(path)}:
            where = f"{path.relative_to(ROOT)} imports llm_edge.{other}.{module}"
            assert other in ALLOWED[package], where
            allowed = ALLOWED[package][other]
            assert allowed is None or module in allowed, where


def test_packages_form_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        free = [name for name in ALLOWED if name not in order and ALLOWED[name].keys() <= set(order)]
        assert free, f"a cycle among {sorted(ALLOWED.keys() - set(order))}"
        order += free


@pytest.mark.parametrize("package", [name for name in PACKAGES if name in FORBIDDEN])
def test_a_fresh_process_loads_no_forbidden_library(package: str) -> None:
    loaded = loaded_by(package)
    assert f"llm_edge.{package}" in loaded
    assert sorted(set(FORBIDDEN[package]) & loaded) == []
    of_ours = {name.split(".")[1] for name in loaded if name.startswith("llm_edge.")}
    allowed = ALLOWED[package].keys()
    assert of_ours <= {package}.union(allowed, *(ALLOWED[other].keys() for other in allowed if other == "chat"))


def test_importing_the_runtime_is_lazy() -> None:
    names = json.loads(python("import json, sys, llm_edge.runtime\nprint(json.dumps(list(sys.modules)))"))
    assert not {"numpy", "onnxruntime", "tokenizers", "jinja2"} & set(names)
    # `load` imports these while checksums are computed, and onnxruntime before the others.
    code = "import json, sys\nfrom llm_edge.runtime import Model\nprint(json.dumps(list(sys.modules)))"
    assert not {"numpy", "onnxruntime", "tokenizers", "jinja2", "asyncio"} & set(json.loads(python(code)))


COMMANDS = {
    "llm-export": "exporter",
    "llm-chat": "tui",
    "llm-bench": "bench",
    "llm-serve": "server",
    "llm-finetune": "finetune",
}


@pytest.mark.parametrize("command", [name for name, package in COMMANDS.items() if package in PACKAGES])
def test_help_loads_no_heavy_library(command: str) -> None:
    code = f"""
import json, sys
from llm_edge.{COMMANDS[command]}.cli import main
sys.argv = [{command!r}, "--help"]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(json.dumps(list(sys.modules)))
"""
    *text, last = python(code).splitlines()
    assert any("Usage" in line for line in text)
    heavy = {"numpy", "onnxruntime", "tokenizers", "jinja2", *TORCH_SIDE, *SCREENS}
    assert sorted(heavy & set(json.loads(last))) == []


def test_telemetry_is_off_before_onnxruntime_starts() -> None:
    code = "import os, llm_edge.runtime.backend.session\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code).strip() == "1"
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    importers = {str(p.relative_to(ROOT)) for p in sources if "onnxruntime" in {n.split(".")[0] for n in imports(p)}}
    # the runtime package turns it off
    assert importers <= {
        f"runtime/backend/{name}.py" for name in ("graph", "kv_cache", "providers", "states", "weights")
    }

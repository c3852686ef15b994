"""Output folders of exports: only bundles are ever replaced, and concurrent exports do not overwrite each other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_edge.exporter.bundle.staging import check_disk_space, check_target, staging
from llm_edge.runtime.errors import InputError, MachineError


def manifest_of_a_web_page(bundle: Path) -> None:
    shutil.rmtree(bundle)
    (bundle / "src").mkdir(parents=True)
    (bundle / "manifest.json").write_text(json.dumps({"name": "My page", "files": {"src/main.js": {}}}))
    (bundle / "src" / "main.js").write_text("work of years")


def users_notes(bundle: Path) -> None:
    (bundle / "onnx" / "notes.md").write_text("work of years")


def another_bundle(bundle: Path) -> None:
    shutil.copytree(bundle, bundle / "inner")


def a_folder_of_pictures(bundle: Path) -> None:
    (bundle / "pictures").mkdir()


def a_link_instead_of_a_folder(bundle: Path) -> None:
    (bundle / "onnx").rename(bundle.with_name("elsewhere"))
    (bundle / "onnx").symlink_to(bundle.with_name("elsewhere"))


def a_damaged_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [
        manifest_of_a_web_page,
        users_notes,
        another_bundle,
        a_folder_of_pictures,
        a_link_instead_of_a_folder,
        a_damaged_manifest,
    ],
)
def test_force_replaces_only_bundles(change: Callable[[Path], None], tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    check_target(bundle, force=True)
    change(bundle)
    for force in (True, False):
        with pytest.raises(InputError, match=r"exists and contains .*, which is not part of a bundle: .* -o$"):
            check_target(bundle, force)


def test_force_replaces_a_bundle_and_an_empty_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--force"):
        check_target(tiny_bundle, force=False)
    check_target(tmp_path, force=True)


def test_a_target_created_by_another_process_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def export_while_target_appears() -> None:
        with staging(target, force=False) as folder:
            (folder / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(InputError, match="created by another process"):
        export_while_target_appears()
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "theirs"]


@pytest.mark.parametrize("name", ["file/below", "x" * 300])
def test_an_invalid_target_path_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another one with -o"), staging(tmp_path / name, force=False):
        pass


def test_a_small_shortage_of_disk_space_is_reported_with_decimals(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk_space(tmp_path, free // 2)
    with pytest.raises(MachineError, match=r"about [\d,]+\.\d MB, but only [\d,]+\.\d MB are free: free disk space"):
        check_disk_space(tmp_path, 2 * free)


HANGS = """
import sys
from pathlib import Path
from llm_edge.exporter.bundle.staging import staging
from llm_edge.runtime.command import run
def command():
    with staging(Path(sys.argv[1]), force=False) as folder:
        print("waiting", flush=True)
        import time
        time.sleep(100)
sys.exit(run(command))
"""


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_leaves_no_files(how: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-c", HANGS, str(tmp_path / "bundle")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []

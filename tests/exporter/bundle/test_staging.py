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

from llm_edge.exporter.bundle.staging import check_disk_space, check_target, recover, staging
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


# ---- killed exports

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from llm_edge.exporter.bundle import staging as module
target, at, before, atomic = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "before", sys.argv[4] == "atomic"
count = 0
def deadly(call):
    def wrapper(*arguments, **options):
        global count
        count += 1
        if before and count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **options)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper
if not atomic:
    module.exchange = lambda first, second: False
module.exchange = deadly(module.exchange)
for name in ("rename", "mkdir"):
    setattr(Path, name, deadly(getattr(Path, name)))
os.unlink, os.rmdir = deadly(os.unlink), deadly(os.rmdir)
shutil.rmtree = deadly(shutil.rmtree)
for line in module.recover(target):
    print(line)
with module.staging(target, force=True) as folder:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("new")
    (folder / "manifest.json").write_text("new")
print("complete")
"""


def content(folder: Path) -> str:
    return (folder / "manifest.json").read_text() + (folder / "onnx" / "model.onnx").read_text()


def run_killed(target: Path, at: int, moment: str, how: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", KILLED, str(target), str(at), moment, how]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("how", ["atomic", "two renames"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_change_of_a_folder_loses_no_bundle(how: str, moment: str, tmp_path: Path) -> None:
    """`moment` is relative to the change; afterwards the next export finds nothing but its target."""
    for at in range(1, 30):
        parent = tmp_path / str(at)
        target = parent / "bundle"
        (target / "onnx").mkdir(parents=True)
        for name in ("manifest.json", "onnx/model.onnx"):
            (target / name).write_text("old")
        done = run_killed(target, at, moment, how)
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            assert content(target) == "newnew"
            break
        assert done.returncode == -signal.SIGKILL
        if how == "two renames":
            recover(target)
        assert content(target) in ("oldold", "newnew")
        recover(target)
        assert [path.name for path in parent.iterdir()] == ["bundle"]
        assert content(target) in ("oldold", "newnew")
    assert at > 4


def test_recovery_reports_what_it_did(tmp_path: Path) -> None:
    old, partial = tmp_path / ".bundle.old-0123abcd", tmp_path / ".other.partial-0123abcd"
    for folder in (old, partial):
        (folder / "onnx").mkdir(parents=True)
        (folder / "manifest.json").touch()
    lines = recover(tmp_path / "bundle")
    assert lines == [
        f"removed {partial}, left by an interrupted export",
        f"restored {tmp_path / 'bundle'}, which an interrupted export had moved aside",
    ]
    assert recover(tmp_path / "bundle") == []
    assert recover(tmp_path / "missing" / "bundle") == []


def test_recovery_leaves_other_folders_and_running_exports_alone(tmp_path: Path) -> None:
    foreign = tmp_path / ".bundle.partial-0123abcd"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    others = [".bundle.partial-x", "bundle.partial-0123abcd", ".partial-0123abcd"]
    for name in others:
        (tmp_path / name).mkdir()
    with staging(tmp_path / "bundle", force=False) as folder:
        (folder / "manifest.json").touch()
        assert recover(tmp_path / "bundle") == []
        assert folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", foreign.name, *others}


def test_a_folder_being_replaced_by_another_process_is_not_restored(tmp_path: Path) -> None:
    with staging(tmp_path / "bundle", force=False) as folder:
        (tmp_path / ".bundle.old-0123abcd").mkdir()
        assert recover(tmp_path / "bundle") == []
        assert folder.exists()
    assert recover(tmp_path / "bundle") == [
        f"removed {tmp_path / '.bundle.old-0123abcd'}, left by an interrupted export"
    ]


def test_long_names_share_no_temporary_folders(tmp_path: Path) -> None:
    names = ["x" * 254 + end for end in "ab"]
    for name in names:
        with staging(tmp_path / name, force=False) as folder:
            assert len(folder.name.encode()) <= 255
            folder.rename(folder.with_name(folder.name.replace(".partial-", ".old-")))
            folder.mkdir()
        shutil.rmtree(tmp_path / name)
    assert recover(tmp_path / names[1]) == [
        f"restored {tmp_path / names[1]}, which an interrupted export had moved aside"
    ]
    assert (tmp_path / names[1]).exists()
    assert not (tmp_path / names[0]).exists()

"""Weights mapped by the runtime: the same logits as from onnxruntime's own mapping; their pages are released."""

from __future__ import annotations

import gc
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from sessions import open_file, open_precision

from llm_edge.runtime.backend.graph import ExecutionOptions, Graph, GraphFile
from llm_edge.runtime.backend.graph_check import check_graph
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.errors import BundleError

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")


def logits_of(session: Session) -> npt.NDArray[np.float32]:
    """Logits of a prompt and of three tokens after it."""
    tokens = np.arange(100) % session.shape.vocab_size
    rows = [session.step(tokens, num_logits=0).copy()]
    rows += [session.step([token]).copy() for token in range(3)]
    return np.concatenate(rows)


def resident(path: Path) -> int:
    """Bytes in memory of a file that the runtime mapped (read-only and shared; onnxruntime maps small weights)."""
    smaps = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf" r--s .*{re.escape(str(path))}\n(?:.+\n)*?Rss: +(\d+) kB", smaps)
    assert sizes
    return 1024 * sum(map(int, sizes))


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that nothing else in this process has mapped, on the disk: pages in writeback are not released."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for path in folder.rglob("*_data"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_portable_bundle"])
def test_logits_do_not_depend_on_who_maps_the_weights(
    fixture: str, precision: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(fixture)
    ours = logits_of(open_precision(path, precision))
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    assert np.array_equal(logits_of(open_precision(path, precision)), ours)


@linux
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_pages_are_released_after_loading_and_after_a_prompt(copied: Path, precision: str) -> None:
    bundle = Bundle.open(copied)
    model = bundle.file(bundle.precision(precision).model)
    weights = model.with_name(f"{model.name}_data")
    session = open_precision(copied, precision)
    assert resident(weights) == 0
    session.step(np.arange(100))
    assert resident(weights) == 0
    session.step([1])
    assert resident(weights) > 0  # the row of the embedding


def test_several_graphs_share_a_file(tiny_bundle: Path) -> None:
    first, second = open_precision(tiny_bundle, "int8"), open_precision(tiny_bundle, "int8")
    expected = logits_of(first)
    del first
    gc.collect()
    assert np.array_equal(logits_of(second), expected)


def test_a_graph_without_a_file_of_weights_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    file = GraphFile.of(bundle, bundle.precision("int8"))
    onnx.save(onnx.load(file.path), tmp_path / "model.onnx")
    inline = open_file(tmp_path / "model.onnx", bundle.shape, file.share_buffer, "cpu", 1)
    assert np.array_equal(logits_of(inline), logits_of(open_precision(tiny_bundle, "int8")))


@pytest.mark.parametrize("kept", [0, 1, 5000, None])
def test_a_file_that_was_cut_or_removed_since_it_was_checked_is_an_error(copied: Path, kept: int | None) -> None:
    bundle = Bundle.open(copied)
    file = GraphFile.of(bundle, bundle.precision("fp32"))
    tensors = check_graph(file.path)
    weights = file.path.with_name(f"{file.path.name}_data")
    if kept is None:
        weights.unlink()
    else:
        os.truncate(weights, kept)
    with pytest.raises(BundleError, match=r"export the bundle again$"):
        Graph(file, "cpu", ExecutionOptions("cpu", 1), tensors)
    with pytest.raises(BundleError, match=r"weights are outside of their file"):
        open_file(file.path, file.shape, file.share_buffer)


LOADING = """
import sys, threading
from llm_edge.runtime import Model, SamplingParams

def load() -> None:
    for _ in range(20):
        model = Model.load(sys.argv[1], threads=1)
        list(model.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3)))

threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_models_are_loaded_and_freed_in_several_threads(tiny_bundle: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LOADING, tiny_bundle], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")

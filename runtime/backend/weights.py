"""`MappedWeights`: the weights of a graph as onnxruntime values over one read-only mapping of their file.

onnxruntime packs weights into private memory. Those that a second operator reads, such as an embedding that is also the
head, it keeps mapped, and their pages stay in memory. Pages of this mapping can be released at any time, also while
onnxruntime reads them: they come from the file again.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llm_edge.runtime.backend.graph_check import ExternalTensor
from llm_edge.runtime.background import Background

_DTYPES: Mapping[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16}
"""numpy's types by TensorProto.DataType; onnxruntime itself maps weights of other types."""
_MIN_BYTES = mmap.PAGESIZE
_SECONDS = 0.005  # between releases; packing reads about 10 MB in this time


class MappedWeights:
    """Weights as onnxruntime values, which have to be kept as long as sessions that use them.

    Without madvise(2), and if the file is not what was checked, there are none, and onnxruntime reads the file itself.

    Args:
        path: the file with the weights.
        tensors: where they are, as `check_graph` returns them.

    Attributes:
        values: the weights by name.
    """

    def __init__(self, path: Path, tensors: Sequence[ExternalTensor]) -> None:
        self.values: dict[str, Any] = {}
        self._advice: int | None = getattr(mmap, "MADV_DONTNEED", None)
        if self._advice is None:
            return
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for tensor in tensors:
                if tensor.size >= _MIN_BYTES and tensor.kind in _DTYPES:
                    array = np.frombuffer(self._mapping, _DTYPES[tensor.kind], tensor.elements, tensor.offset)
                    self.values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array.reshape(tensor.dims))
        except (OSError, ValueError):
            self.values.clear()

    def release(self) -> None:
        """Release the pages that were read so far."""
        if self.values and self._advice is not None:
            self._mapping.madvise(self._advice)

    @contextlib.contextmanager
    def releasing(self) -> Iterator[None]:
        """Release pages again and again during the block, and after it."""
        if not self.values:
            yield
            return
        ended = threading.Event()
        with Background(lambda: self._release_until(ended), "llm-edge-release-weights"):
            try:
                yield
            finally:
                ended.set()

    def _release_until(self, ended: threading.Event) -> None:
        while not ended.wait(_SECONDS):
            self.release()
        self.release()

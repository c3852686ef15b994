"""`LoadOptions`: how a bundle is loaded. Importing it loads neither numpy nor onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a bundle is loaded.

    Attributes:
        precision: one that the bundle contains; None = int8 if there is one, on CUDA fp16.
        provider: `cpu`, `cuda`, or `auto`: CUDA where it works and has kernels for the graph's matmuls, else the CPU.
        threads: per operator; None = the number of physical cores. TorchScript: of torch, for the whole process.
        verify: compare the checksums of everything that is loaded. TorchScript is code and always needs it.
        draft: folder of a smaller bundle with the same vocabulary, which proposes draft tokens; see `DraftModel`.
        draft_precision: of that bundle; None as above.
        step_seconds: steps that take longer are terminated, and their generations fail; None = no limit. torch cannot
            terminate a step of TorchScript.
    """

    precision: str | None = None
    provider: str = "auto"
    threads: int | None = None
    verify: bool = True
    draft: str | Path | None = None
    draft_precision: str | None = None
    step_seconds: float | None = 300.0

    @property
    def draft_options(self) -> LoadOptions:
        """The options for loading the draft model."""
        return replace(self, precision=self.draft_precision, draft=None, draft_precision=None)

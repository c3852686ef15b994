"""Loads bundles: `LoadOptions` and `load`, which `Model`, `Engine` and draft models share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import AnySession, open_session
from llm_edge.runtime.backend.providers import cuda_works
from llm_edge.runtime.bundle import TORCHSCRIPT, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ParameterError
from llm_edge.runtime.text.tokenizer import Tokenizer


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
    """

    precision: str | None = None
    provider: str = "auto"
    threads: int | None = None
    verify: bool = True
    draft: str | Path | None = None
    draft_precision: str | None = None

    @property
    def draft_options(self) -> LoadOptions:
        """The options for loading the draft model."""
        return replace(self, precision=self.draft_precision, draft=None, draft_precision=None)


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle in memory.

    Attributes:
        bundle: the folder.
        precision: the graph that was loaded.
        tokenizer: the bundle's tokenizer.
        session: over the graph.
    """

    bundle: Bundle
    precision: PrecisionInfo
    tokenizer: Tokenizer
    session: AnySession


def load(path: str | Path, options: LoadOptions, *, fused: bool = False, interleaved: bool = False) -> LoadedBundle:
    """Load a bundle, without its draft model.

    Args:
        path: the folder.
        options: see `LoadOptions`.
        fused: require a fused graph, whose cache can be shared and rewound.
        interleaved: another model runs between this one's steps.

    Raises:
        BundleError: the folder is missing, damaged or modified, or the graph is not fused and has to be.
        ParameterError: an unknown precision, or a TorchScript bundle with `verify=False`.
        InputError: a TorchScript bundle where torch is not installed.
        ProviderError: CUDA was requested and does not work here.
    """
    prefers_half = options.precision is None and options.provider != "cpu" and cuda_works()
    bundle, precision, tokenizer = _open(path, options, prefers_half)
    if fused and not precision.share_buffer:
        raise BundleError(f"{bundle.path}: {precision.name} is not a fused ONNX graph: export with --graph fused")
    execution = ExecutionOptions(options.provider, options.threads, interleaved=interleaved)
    session = open_session(GraphFile.of(bundle, precision), execution)
    if precision.name == "fp16" and prefers_half and session.provider == "cpu":  # CUDA rejected it; slow on CPUs
        return load(path, replace(options, provider="cpu"), fused=fused, interleaved=interleaved)
    return LoadedBundle(bundle, precision, tokenizer, session)


def _open(path: str | Path, options: LoadOptions, prefers_half: bool) -> tuple[Bundle, PrecisionInfo, Tokenizer]:
    bundle = Bundle.open(path)
    precision = bundle.precision(options.precision, half=prefers_half)
    if precision.format == TORCHSCRIPT and not options.verify:
        raise ParameterError(f"{bundle.path}: TorchScript is code and can only be loaded with verify=True")
    if options.verify:
        bundle.verify(precision.name)
    config = bundle.json("tokenizer_config.json")
    tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), config, bundle.chat_template())
    if tokenizer.vocab_size > bundle.shape.vocab_size:
        raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
    return bundle, precision, tokenizer

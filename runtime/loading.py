"""Loads bundles: `load`, which `Model`, `Engine` and draft models share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_edge.runtime.background import Background
from llm_edge.runtime.bundle import TORCHSCRIPT, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ParameterError
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.safe_io import MIB

if TYPE_CHECKING:
    from llm_edge.runtime.backend.open import AnySession
    from llm_edge.runtime.text.tokenizer import Tokenizer

_LARGE = 32 * MIB  # files whose checksums are computed while they are being loaded


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle, its tokenizer, and a session over the graph of a precision."""

    bundle: Bundle
    precision: PrecisionInfo
    tokenizer: Tokenizer
    session: AnySession


def load(path: str | Path, options: LoadOptions, *, fused: bool = False, interleaved: bool = False) -> LoadedBundle:
    """Load a bundle, without its draft model.

    Checksums of large files, onnxruntime's session and the tokenizer are computed at the same time, and modules are
    imported when they are needed: checksums need none of them, and the session only onnxruntime.

    Args:
        path: the folder.
        options: its `draft` is ignored.
        fused: require a fused graph, whose cache can be shared and rewound.
        interleaved: another model runs between this one's steps.

    Raises:
        BundleError: the folder is missing, damaged or modified, or the graph is not fused and has to be.
        ParameterError: an unknown precision, or a TorchScript bundle with `verify=False`.
        InputError: a TorchScript bundle where torch is not installed.
        ProviderError: CUDA was requested and does not work here.
    """
    bundle = Bundle.open(path)
    prefers_half = _prefers_half(bundle, options)
    precision = bundle.precision(options.precision, half=prefers_half)
    if precision.format == TORCHSCRIPT and not options.verify:
        raise ParameterError(f"{bundle.path}: TorchScript is code and can only be loaded with verify=True")
    files = bundle.files_of(precision.name) if options.verify else []
    large = [name for name in files if bundle.size(name) >= _LARGE and precision.format != TORCHSCRIPT]
    bundle.check(name for name in files if name not in large)
    with Background(functools.partial(bundle.check, large, cached=True), "llm-edge-checksums"):
        if fused and not precision.share_buffer:
            raise BundleError(f"{bundle.path}: {precision.name} is not a fused ONNX graph: export with --graph fused")
        # An engine needs the whole tokenizer: loading it later could stop all answers for a second.
        session, tokenizer = _session_and_tokenizer(bundle, precision, options, interleaved, lazy=not fused)
    if precision.name == "fp16" and prefers_half and session.provider == "cpu":  # CUDA rejected it; slow on CPUs
        return load(path, replace(options, provider="cpu"), fused=fused, interleaved=interleaved)
    return LoadedBundle(bundle, precision, tokenizer, session)


def _prefers_half(bundle: Bundle, options: LoadOptions) -> bool:
    if options.precision is not None or options.provider == "cpu" or "fp16" not in bundle.precisions:
        return False
    from llm_edge.runtime.backend.providers import cuda_works

    return cuda_works()


def _session_and_tokenizer(
    bundle: Bundle, precision: PrecisionInfo, options: LoadOptions, interleaved: bool, *, lazy: bool
) -> tuple[AnySession, Tokenizer]:
    from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
    from llm_edge.runtime.backend.graph_check import check_graph
    from llm_edge.runtime.backend.open import open_session

    execution = ExecutionOptions(
        options.provider, options.threads, interleaved=interleaved, step_seconds=options.step_seconds
    )
    file = GraphFile.of(bundle, precision)
    # Before the other thread starts, because checking a graph needs the interpreter's lock.
    tensors = None if file.format == TORCHSCRIPT else check_graph(file.path)
    # The session is opened on this thread, which runs steps too: memory that opening frees is used by them.
    loading = Background(functools.partial(_load_tokenizer, bundle, cached=lazy), "llm-edge-load-tokenizer")
    with loading:  # onnxruntime does not hold the interpreter's lock meanwhile
        session = open_session(file, execution, tensors)
    return session, loading.result()


def _load_tokenizer(bundle: Bundle, *, cached: bool) -> Tokenizer:
    """Load the tokenizer, and import what generating needs besides, which takes as long as a few decode steps."""
    tokenizer = _tokenizer(bundle, cached=cached)
    import llm_edge.runtime.scheduling.sequence_factory
    import llm_edge.runtime.speculative.draft_model  # noqa: F401

    return tokenizer


def _tokenizer(bundle: Bundle, *, cached: bool) -> Tokenizer:
    from llm_edge.runtime.text.tokenizer import Tokenizer

    config, vocab_size = bundle.json("tokenizer_config.json"), bundle.shape.vocab_size
    tokenizer = Tokenizer.from_files(
        bundle.file("tokenizer.json"),
        config,
        bundle.chat_template(),
        bundle.named_templates(),
        vocab_size=vocab_size,
        cached=cached,
    )
    if tokenizer.vocab_size > vocab_size:
        raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
    return tokenizer

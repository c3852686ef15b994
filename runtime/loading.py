"""Loads bundles: `load`, which `Model`, `Engine` and draft models share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import AnySession, open_session
from llm_edge.runtime.backend.providers import cuda_works
from llm_edge.runtime.bundle import TORCHSCRIPT, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ParameterError
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle, its tokenizer, and a session over the graph of a precision."""

    bundle: Bundle
    precision: PrecisionInfo
    tokenizer: Tokenizer
    session: AnySession


def load(path: str | Path, options: LoadOptions, *, fused: bool = False, interleaved: bool = False) -> LoadedBundle:
    """Load a bundle, without its draft model.

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
    prefers_half = options.precision is None and options.provider != "cpu" and cuda_works()
    bundle, precision, tokenizer = _open(path, options, prefers_half)
    if fused and not precision.share_buffer:
        raise BundleError(f"{bundle.path}: {precision.name} is not a fused ONNX graph: export with --graph fused")
    execution = ExecutionOptions(
        options.provider, options.threads, interleaved=interleaved, step_seconds=options.step_seconds
    )
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
    vocab_size = bundle.shape.vocab_size
    tokenizer = Tokenizer.from_files(
        bundle.file("tokenizer.json"), config, bundle.chat_template(), bundle.named_templates(), vocab_size=vocab_size
    )
    if tokenizer.vocab_size > vocab_size:
        raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
    return bundle, precision, tokenizer

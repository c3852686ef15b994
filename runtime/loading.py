"""Opens a bundle."""

from __future__ import annotations

from pathlib import Path

from llm_edge.runtime.bundle import TORCHSCRIPT, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ParameterError
from llm_edge.runtime.text.tokenizer import Tokenizer


def open_bundle(
    path: str | Path, precision: str | None, *, verify: bool, half: bool = False
) -> tuple[Bundle, PrecisionInfo, Tokenizer]:
    """Open a bundle and read its tokenizer; see `Model.load`, and `Bundle.precision` for `half`."""
    bundle = Bundle.open(path)
    info = bundle.precision(precision, half=half)
    if info.format == TORCHSCRIPT and not verify:
        raise ParameterError(f"{bundle.path}: TorchScript is a program: it is loaded with verify=True only")
    if verify:
        bundle.verify(info.name)
    config = bundle.json("tokenizer_config.json")
    tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), config, bundle.chat_template())
    if tokenizer.vocab_size > bundle.shape.vocab_size:
        raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
    return bundle, info, tokenizer

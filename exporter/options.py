"""`ExportOptions`: every option of an export, each with its command-line flag and help text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Option

PRECISIONS = {
    "fp32": "",
    "int8": "",
    "int8-exact": "",
    "int4": "",
    "int4-mixed": "",
    "source": "keeps the weights of a quantized GGUF",
    "int8-kv8": "8-bit KV cache",
    "fp16": "CUDA",
}
"""The names that `--precision` takes, with a note where one is needed; `quantization/recipes.py` defines them."""
_PRECISION_LIST = ", ".join(f"{name} ({note})" if note else name for name, note in PRECISIONS.items())


class FileFormat(StrEnum):
    """File format of the exported precisions."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"


class GraphChoice(StrEnum):
    """Requested style of the ONNX graphs; AUTO selects the fused style if the model's head size allows it."""

    AUTO = "auto"
    FUSED = "fused"
    PORTABLE = "portable"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export.

    Each field is also an option of `llm-export`; its annotation holds the flag and the help text.
    """

    output: Annotated[
        Path | None, Option("--output", "-o", help="Bundle folder to create. Default: artifacts/<name of the source>.")
    ] = None
    file_format: Annotated[
        FileFormat, Option("--format", help="onnx, or torchscript: an fp32 module for torch.jit.load.")
    ] = FileFormat.ONNX
    precision: Annotated[
        str | None,
        Option(
            help=f"Comma-separated list of {_PRECISION_LIST}. Default: fp32,int8,int4; "
            "source for a quantized GGUF; fp32 with --format torchscript."
        ),
    ] = None
    target_size: Annotated[
        float | None,
        Option(metavar="MB", help="Add the precision mixed: the most faithful mix of formats of this size."),
    ] = None
    target_bpw: Annotated[
        float | None,
        Option(metavar="BITS", help="Add the precision mixed: the most faithful mix with this many bits per weight."),
    ] = None
    target_kl: Annotated[
        float | None,
        Option(metavar="NATS", help="Add the precision mixed: the smallest mix with this mean KL divergence."),
    ] = None
    graph: Annotated[
        GraphChoice,
        Option(
            help="fused: fastest in onnxruntime. portable: standard ONNX operators only. auto: fused where supported."
        ),
    ] = GraphChoice.AUTO
    hidden_states: Annotated[
        bool, Option("--hidden-states", help="Add hidden states to the outputs, as required by Model.embed.")
    ] = False
    refine: Annotated[
        bool,
        Option("--refine", help="Train 4-bit weights layer by layer after rounding: more faithful, takes minutes."),
    ] = False
    adapter: Annotated[
        str | None, Option(help="Folder or Hugging Face id of a PEFT LoRA adapter to merge into the weights.")
    ] = None
    config: Annotated[
        Path | None, Option(help="For a bare state dict: its config.yaml, params.json or config.json.")
    ] = None
    tokenizer: Annotated[
        Path | None,
        Option(help="For a bare state dict: folder with tokenizer.json, or with …vocab.json and …merges.txt."),
    ] = None
    n_heads: Annotated[int | None, Option(help="For a bare state dict: number of query heads.")] = None
    n_kv_heads: Annotated[int | None, Option(help="For a bare state dict: number of key/value heads.")] = None
    rope_theta: Annotated[float | None, Option(help="For a bare state dict: base of the rotary embedding.")] = None
    norm_eps: Annotated[float | None, Option(help="For a bare state dict: epsilon of the norms.")] = None
    max_seq_len: Annotated[
        int | None, Option(help="Maximum context length in tokens. Any source: shorten the context to this length.")
    ] = None
    validate: Annotated[
        bool, Option("--validate/--no-validate", help="Verify parity with PyTorch and measure quality.")
    ] = True
    force: Annotated[bool, Option("--force", help="Replace an existing bundle at the output folder.")] = False
    resume: Annotated[
        bool, Option("--resume", help="Continue an interrupted export, given the same source and options.")
    ] = False

"""The engines to measure: their models, converted from the same GGUF, and the commands of their workers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_edge.bench.driver import our_command
from llm_edge.bench.peers.environments import ENVIRONMENTS, call, python_of
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.errors import InputError

HERE = Path(__file__).resolve().parent
OURS = "ours"

# Contender -> arguments of the peer's own tool; None = the file unchanged. Flash attention, llama.cpp's default, is the
# faster in prefill and slower after a long context, so both are measured.
_NO_FLASH = "no-flash"
_LLAMACPP = {
    f"{kind}{suffix}": made
    for kind, made in {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K_M", "source": None}.items()
    for suffix in ("", f"-{_NO_FLASH}")
}
_GENAI = {
    "int8": ("-p", "int8"),
    "int4": ("-p", "int4", "--extra_options", "algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"),
    "int4-k_quant": ("-p", "int4", "--extra_options", "algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"),
}
_OPENVINO = {
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "64"),  # its default of 128 does not divide 576
}
PEERS: Mapping[str, tuple[str, ...]] = {
    "llama.cpp": tuple(_LLAMACPP),
    "genai": tuple(_GENAI),
    "openvino": tuple(_OPENVINO),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine in a precision.

    Attributes:
        name: engine/precision.
        size: bytes of graph and weights.
        speed: command of a worker that generates.
        logits: command of a worker that computes logits.
    """

    name: str
    size: int
    speed: tuple[str, ...]
    logits: tuple[str, ...]

    def with_prefix(self, prefix: Sequence[str]) -> Contender:
        """The same contender with its commands prefixed by another command."""
        return Contender(self.name, self.size, (*prefix, *self.speed), (*prefix, *self.logits))


@dataclass(frozen=True, slots=True)
class Source:
    """The weights for peers: a GGUF, its hash prefix, and a bundle exported from it (for the tokenizer)."""

    gguf: Path
    key: str
    bundle: Path


def choose(only: str | None, precisions: Sequence[str]) -> list[str]:
    """Names of contenders, grouped by engine.

    Args:
        only: comma-separated engines or engine/precision; None = all, of ours the quantized ones.
        precisions: of the bundle.

    Raises:
        InputError: an unknown name.
    """
    known = [f"{OURS}/{name}" for name in precisions]
    known += [f"{peer}/{name}" for peer, names in PEERS.items() for name in names]
    asked = [name.strip() for name in only.split(",")] if only is not None else [OURS, *PEERS]
    found: set[str] = set()
    for name in asked:
        matches = [other for other in known if name == other or name == other.split("/")[0]]
        if name == OURS:
            matches = [other for other in matches if other.split("/")[1] not in ("fp32", "fp16")]
        if not matches:
            raise InputError(f"--only: {name!r} is not known; known: {', '.join([OURS, *PEERS])} or {', '.join(known)}")
        found.update(matches)
    return [name for name in known if name in found]


def make(
    names: Sequence[str], bundle: Bundle, source: Source | None, work: Path, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """Contenders ready to run; installs and converts what is missing.

    Args:
        names: from `choose`.
        bundle: ours.
        source: weights for peers; None if `names` has none.
        work: folder for environments and models.
        threads: per engine.
        say: receives status messages.

    Raises:
        MachineError: a peer cannot be installed, or cannot convert the model.
    """
    found = []
    for name in names:
        if name.startswith(f"{OURS}/"):
            found.append(_ours(name, bundle, threads))
        else:
            assert source is not None
            found.append(_peer(name, source, work, threads, say))
    return found


def our_logits(bundle: Path, precision: str, threads: int) -> tuple[str, ...]:
    """Command of a worker that computes logits of a bundle's precision."""
    return (sys.executable, "-m", "llm_edge.bench.peers.our_logits", str(bundle), precision, str(threads))


def _ours(full: str, bundle: Bundle, threads: int) -> Contender:
    name = full.removeprefix(f"{OURS}/")
    speed = tuple(our_command(bundle.path, name, threads))
    return Contender(full, bundle.precision(name).size, speed, our_logits(bundle.path, name, threads))


def _peer(full: str, source: Source, work: Path, threads: int, progress: Callable[[str], None]) -> Contender:
    engine, _, name = full.partition("/")
    python = python_of(ENVIRONMENTS[engine], work, progress)
    model, files = _MAKERS[engine](python, name, source, work, progress)
    worker = HERE / f"{engine.replace('.', '')}_worker.py"
    options = (_NO_FLASH,) if name.endswith(_NO_FLASH) else ()
    command = (str(python), str(worker), str(model), str(threads), *options)
    return Contender(full, sum(file.stat().st_size for file in files), command, command)


def _llamacpp(
    python: Path, name: str, source: Source, work: Path, progress: Callable[[str], None]
) -> tuple[Path, list[Path]]:
    kind = _LLAMACPP[name]
    if kind is None:
        return source.gguf, [source.gguf]
    tool = (str(python), str(HERE / "llamacpp_quantize.py"), str(source.gguf), "{}", kind)
    model = _converted(work / "llama.cpp", f"{source.key}/{kind}.gguf", tool, progress)
    return model, [model]


def _genai(
    python: Path, name: str, source: Source, work: Path, progress: Callable[[str], None]
) -> tuple[Path, list[Path]]:
    folder = _hf_folder("genai", python, source, work, progress)
    builder = (str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", "{}", "-e", "cpu")
    tool = (*builder, "-c", str(work / "genai" / "cache"), *_GENAI[name])
    model = _converted(work / "genai", f"{source.key}/{name}", tool, progress)
    return model, [model / "model.onnx", model / "model.onnx.data"]


def _openvino(
    python: Path, name: str, source: Source, work: Path, progress: Callable[[str], None]
) -> tuple[Path, list[Path]]:
    folder = _hf_folder("openvino", python, source, work, progress)
    command = (str(python.parent / "optimum-cli"), "export", "openvino", "-m", str(folder))
    options = ("--task", "text-generation-with-past", "--disable-convert-tokenizer")
    tool = (*command, *options, *_OPENVINO[name], "{}")
    model = _converted(work / "openvino", f"{source.key}/{name}", tool, progress)
    return model, [model / "openvino_model.xml", model / "openvino_model.bin"]


_MAKERS = {"llama.cpp": _llamacpp, "genai": _genai, "openvino": _openvino}


def _hf_folder(peer: str, python: Path, source: Source, work: Path, progress: Callable[[str], None]) -> Path:
    """The weights in float32 as transformers writes them."""
    tool = (str(python), str(HERE / "hf_folder.py"), str(source.gguf), str(source.bundle), "{}")
    return _converted(work / peer, f"{source.key}/float32", tool, progress)


def _converted(home: Path, name: str, tool: Sequence[str], progress: Callable[[str], None]) -> Path:
    """The output that a tool creates at the `{}` in its arguments, created once; incomplete output has another name."""
    target = home / "models" / name
    if target.exists():
        return target
    progress(f"{home.name}: making {target.name}")
    partial = target.with_name(f"partial-{target.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    call([str(partial) if part == "{}" else part for part in tool], home / "convert.log", home.name)
    partial.rename(target)
    return target

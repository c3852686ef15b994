"""`open_checkpoint`: opens what the user names, a model name, Hugging Face id, folder or file.

To add a format, write a sub-package with a function that returns a `Checkpoint`, and add an entry to `_READERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.download.hub import fetch_adapter, fetch_checkpoint, is_hub_id
from llm_edge.checkpoint.download.smollm2 import smollm2_gguf
from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.checkpoint.gguf.split import base_name
from llm_edge.checkpoint.huggingface.checkpoint import read_file, read_folder
from llm_edge.checkpoint.lora.adapter import Adapter, open_adapter
from llm_edge.checkpoint.meta.checkpoint import has_meta_names, read_state_dict
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.meta.shards import SHARD
from llm_edge.checkpoint.reasoning import find_reasoning
from llm_edge.checkpoint.tensors.tensor_file import open_tensor_file
from llm_edge.checkpoint.vocabulary import fit_to_embedding
from llm_edge.runtime.errors import CheckpointError, ParameterError

SMOLLM2 = "smollm2"
_SMOLLM2_BUNDLE = "smollm2-135m"
_SMOLLM2_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}  # from the model card; the GGUF has none
_STANDARD_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TENSOR_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

Progress = Callable[[str], None]
"""Called with a short message when a slow step starts."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Options that complement the source."""

    state_dict: StateDictOptions = dataclasses.field(default_factory=StateDictOptions)
    adapter: str | None = None  # folder or Hugging Face id of a PEFT LoRA adapter to merge


def open_checkpoint(source: str, options: SourceOptions, progress: Progress) -> Checkpoint:
    """Open a source. Weights are read later, one at a time.

    Args:
        source: `smollm2`, a Hugging Face folder or id, or a `.gguf`, `.pt`, `.pth`, `.bin` or `.safetensors` file.
            The format of a file is detected from its content.
        options: see `SourceOptions`.
        progress: called with a short message when a slow step starts.

    Raises:
        CheckpointError: the source is missing, damaged or of an unsupported kind.
        ParameterError: an option does not apply to this kind of source.
    """
    read = next(reader for matches, reader in _READERS if matches(source))
    checkpoint = _limit_context(read(source, options, progress), options.state_dict.max_seq_len)
    checkpoint = fit_to_embedding(checkpoint)
    if checkpoint.tokenizer.notes:
        checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, *checkpoint.tokenizer.notes))
    if checkpoint.reasoning is None:
        reasoning = find_reasoning(checkpoint.tokenizer.tokenizer_json, checkpoint.tokenizer.chat_template)
        checkpoint = dataclasses.replace(checkpoint, reasoning=reasoning)
    return checkpoint


def bundle_name(source: str) -> str:
    """Return the default folder name of a source's bundle."""
    if source == SMOLLM2:
        return _SMOLLM2_BUNDLE
    if _is_hub_id(source):
        return source.split("/")[1].split("@")[0]
    path = Path(source).resolve()
    if path.name.startswith("consolidated."):  # the file name of all of Meta's models
        return path.parent.name
    if path.suffix == ".gguf":
        return base_name(path)
    return path.stem if path.suffix in _TENSOR_SUFFIXES else path.name


# ---- detection


def _is_hub_id(source: str) -> bool:
    """Whether a text has the form of a Hub id and does not name anything on this machine."""
    path = Path(source)
    is_local = path.exists() or path.is_symlink() or (path.parent != Path() and path.parent.exists())
    return is_hub_id(source) and not is_local


def _is_gguf(source: str) -> bool:
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder ({SMOLLM2!r} downloads a model to try)")
    if not path.is_file():
        raise CheckpointError(f"{source}: neither a file nor a folder")
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror})") from error


# ---- readers


def _read_smollm2(source: str, options: SourceOptions, progress: Progress) -> Checkpoint:
    _reject_options(source, options)
    checkpoint = read_gguf(smollm2_gguf(progress))
    return dataclasses.replace(
        checkpoint,
        generation={**checkpoint.generation, **_SMOLLM2_SAMPLING},
        source=dataclasses.replace(checkpoint.source, name="SmolLM2-135M-Instruct"),
    )


def _read_hub(source: str, options: SourceOptions, progress: Progress) -> Checkpoint:
    checkpoint = _read_folder(str(fetch_checkpoint(source, progress)), options, progress)
    name = source if options.adapter is None else f"{source} + {options.adapter}"
    return dataclasses.replace(checkpoint, source=dataclasses.replace(checkpoint.source, name=name))


def _read_folder(source: str, options: SourceOptions, progress: Progress) -> Checkpoint:
    """Read a Hugging Face folder, or one with a single state dict and its config and tokenizer."""
    folder = Path(source)
    has_config = (folder / "config.json").exists()
    if (folder / "adapter_config.json").exists() and not has_config:
        raise CheckpointError(f"{folder} is a LoRA adapter: export its base model with --adapter {folder}")
    if (folder / "adapter_config.json").exists() and options.adapter is None:
        raise CheckpointError(
            f"{folder} has a model and a LoRA adapter, and transformers loads the adapter only if peft is installed: "
            f"remove adapter_config.json to export the model alone, or merge the adapter with --adapter {folder}"
        )
    found = [path for path in sorted(folder.iterdir()) if path.suffix in _TENSOR_SUFFIXES and path.is_file()]
    bare = len(found) == 1 and found[0].suffix != ".safetensors" and found[0].name != "pytorch_model.bin"
    # Mistral's folders have the model in both formats, and Meta's params.json beside Hugging Face's config.json.
    hugging_face = not (folder / "params.json").exists() or any((folder / name).exists() for name in _STANDARD_WEIGHTS)
    if has_config and hugging_face and not bare:
        _reject_state_dict_options(source, options)
        return read_folder(folder, _open_adapter(options, progress))
    if len(found) == 1 or (found and all(SHARD.fullmatch(path.name) for path in found)):
        return _read_tensor_file(str(found[0]), options, progress)
    if found:
        raise CheckpointError(f"{folder} has no config.json and {len(found)} state dicts: name the file to export")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} has no config.json: name the file to export, for example {ggufs[0]}")
    raise CheckpointError(
        f"{folder} has no config.json: give a Hugging Face folder with config.json, *.safetensors and tokenizer.json, "
        "or a state dict with its config"
    )


def _read_gguf(source: str, options: SourceOptions, _progress: Progress) -> Checkpoint:
    _reject_options(source, options)
    return read_gguf(Path(source))


def _read_tensor_file(source: str, options: SourceOptions, progress: Progress) -> Checkpoint:
    """Read a state dict in Meta's naming, or in that of a Hugging Face config beside it."""
    path, state_dict = Path(source), options.state_dict
    names = open_tensor_file(path).tensors
    if has_meta_names(names):
        if options.adapter is not None:
            raise ParameterError("--adapter: adapters apply to Hugging Face checkpoints: give the base model's folder")
        return read_state_dict(path, state_dict)
    return read_file(path, state_dict.config, state_dict.tokenizer, _open_adapter(options, progress))


_READERS: tuple[tuple[Callable[[str], bool], Callable[[str, SourceOptions, Progress], Checkpoint]], ...] = (
    (lambda source: source == SMOLLM2, _read_smollm2),
    (_is_hub_id, _read_hub),
    (lambda source: Path(source).is_dir(), _read_folder),
    (_is_gguf, _read_gguf),
    (lambda _: True, _read_tensor_file),
)
"""Whether a source is of a kind, and how it is read; the first match is used."""


# ---- options


def _limit_context(checkpoint: Checkpoint, limit: int | None) -> Checkpoint:
    """Shorten the context, which shrinks the position tables and the cache."""
    config = checkpoint.config
    if limit is None or limit == config.max_position_embeddings:
        return checkpoint
    if not 1 < limit < config.max_position_embeddings:
        raise ParameterError(f"--max-seq-len is {limit}; it must be 2 to {config.max_position_embeddings}")
    if config.learned_positions:
        raise ParameterError("--max-seq-len: not supported for families with learned positions")
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, max_position_embeddings=limit))


def _open_adapter(options: SourceOptions, progress: Progress) -> Adapter | None:
    if options.adapter is None:
        return None
    if _is_hub_id(options.adapter):
        return open_adapter(fetch_adapter(options.adapter, progress), name=options.adapter)
    if not Path(options.adapter).is_dir():
        raise CheckpointError(f"--adapter {options.adapter}: no such folder")
    return open_adapter(Path(options.adapter))


def _reject_options(source: str, options: SourceOptions) -> None:
    if options.adapter is not None:
        raise ParameterError(
            f"--adapter: {source} is not a Hugging Face folder; give the folder of the adapter's base model"
        )
    _reject_state_dict_options(source, options)


def _reject_state_dict_options(source: str, options: SourceOptions) -> None:
    for field in dataclasses.fields(options.state_dict):
        if field.name != "max_seq_len" and getattr(options.state_dict, field.name) is not None:
            flag = f"--{field.name.replace('_', '-')}"
            raise ParameterError(f"{flag}: {source} already specifies it; this option is for bare state dicts")

"""From what a user names to a checkpoint: the word `smollm2`, a folder, a file or a Hugging Face id."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.download.hub import fetch_adapter, fetch_checkpoint, is_hub_id
from llm_edge.checkpoint.download.smollm2 import smollm2_gguf
from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.checkpoint.huggingface.folder import read_file, read_folder
from llm_edge.checkpoint.lora.adapter import Adapter, open_adapter
from llm_edge.checkpoint.meta.checkpoint import read_state_dict
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.reasoning import find_reasoning
from llm_edge.checkpoint.tensors.tensor_file import open_tensor_file
from llm_edge.runtime.errors import CheckpointError, ParameterError

SMOLLM2 = "smollm2"
_SMOLLM2_NAME = "smollm2-135m"
_SMOLLM2_SAMPLING = {
    "do_sample": True,
    "temperature": 0.2,
    "top_p": 0.9,
}  # of the model's card; the GGUF has none
_META_EMBEDDING = "tok_embeddings.weight"
_STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What a user says beside the source.

    Attributes:
        state_dict: what a bare state dict does not say of itself; see `StateDictOptions`.
        adapter: folder or Hugging Face id of a PEFT LoRA adapter to merge.
    """

    state_dict: StateDictOptions = dataclasses.field(default_factory=StateDictOptions)
    adapter: str | None = None


def bundle_name(source: str) -> str:
    """Folder name of a source's bundle where the user gives none."""
    if source == SMOLLM2:
        return _SMOLLM2_NAME
    if _is_id(source):
        return source.split("/")[1].split("@")[0]
    path = Path(source).resolve()
    if path.name.startswith("consolidated."):  # what Meta calls all of its models
        return path.parent.name
    return path.stem if path.suffix in (*_STATE_DICT_SUFFIXES, ".gguf") else path.name


def open_checkpoint(source: str, options: SourceOptions, progress: Callable[[str], None]) -> Checkpoint:
    """Open a source; weights are read later, one at a time.

    Args:
        source: `smollm2`, a Hugging Face folder or id, or a `.gguf`, `.pt`, `.pth`, `.bin` or `.safetensors` file,
            told by its content.
        options: see `SourceOptions`.
        progress: is told in a few words what goes on where that takes long.

    Raises:
        CheckpointError: it is missing, damaged or of a kind that is not read.
        ParameterError: an option that this kind of source has no use for, or cannot honour.
    """
    checkpoint = _shortened(_open(source, options, progress), options.state_dict.max_seq_len)
    if checkpoint.reasoning is None:
        reasoning = find_reasoning(checkpoint.tokenizer.tokenizer_json, checkpoint.tokenizer.chat_template)
        checkpoint = dataclasses.replace(checkpoint, reasoning=reasoning)
    return checkpoint


def _open(source: str, options: SourceOptions, progress: Callable[[str], None]) -> Checkpoint:
    if source == SMOLLM2:
        _refuse_options(source, options)
        checkpoint = read_gguf(smollm2_gguf(progress))
        return dataclasses.replace(
            checkpoint,
            generation={**checkpoint.generation, **_SMOLLM2_SAMPLING},
            source=dataclasses.replace(checkpoint.source, name="SmolLM2-135M-Instruct"),
        )
    path = Path(source)
    if _is_id(source):
        checkpoint = _open_folder(fetch_checkpoint(source, progress), options, progress)
        name = source if options.adapter is None else f"{source} + {options.adapter}"
        return dataclasses.replace(checkpoint, source=dataclasses.replace(checkpoint.source, name=name))
    if path.is_dir():
        return _open_folder(path, options, progress)
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder (the word {SMOLLM2!r} fetches a model to try)")
    if not path.is_file():
        raise CheckpointError(f"{source}: neither a file nor a folder")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror})") from error
    if magic == b"GGUF":
        _refuse_options(source, options)
        return read_gguf(path)
    return _open_file(path, options, progress)


def _is_id(text: str) -> bool:
    """Whether a text names something on the Hub: it has the form, and nothing here that it could lead to."""
    path = Path(text)
    here = path.exists() or path.is_symlink() or (path.parent != Path() and path.parent.exists())
    return is_hub_id(text) and not here


def _shortened(checkpoint: Checkpoint, limit: int | None) -> Checkpoint:
    """The same model with a smaller context: smaller tables of positions, a smaller cache."""
    config = checkpoint.config
    if limit is None or limit == config.max_position_embeddings:
        return checkpoint
    if not 1 < limit < config.max_position_embeddings:
        raise ParameterError(f"--max-seq-len is {limit}; the model's own {config.max_position_embeddings} is the most")
    if config.learned_positions:
        raise ParameterError("--max-seq-len: this family learned its positions, the table cannot be cut")
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, max_position_embeddings=limit))


def _open_folder(folder: Path, options: SourceOptions, progress: Callable[[str], None]) -> Checkpoint:
    """A Hugging Face folder, or one that holds a single state dict and what belongs to it."""
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is a LoRA adapter: give its base model, with --adapter {folder}")
    found = [path for path in sorted(folder.iterdir()) if path.suffix in _STATE_DICT_SUFFIXES and path.is_file()]
    bare = len(found) == 1 and found[0].suffix != ".safetensors" and found[0].name != "pytorch_model.bin"
    if (folder / "config.json").exists() and not (folder / "params.json").exists() and not bare:
        _refuse_state_dict_options(str(folder), options)
        return read_folder(folder, _adapter(options, progress))
    if len(found) == 1:
        return _open_file(found[0], options, progress)
    if found:
        raise CheckpointError(f"{folder} has no config.json and {len(found)} state dicts: name the file")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{folder} has no config.json; name the file to export, for example {ggufs[0]}")
    raise CheckpointError(
        f"{folder} has no config.json: a Hugging Face folder with config.json, *.safetensors and tokenizer.json is "
        "needed, or a state dict with its config"
    )


def _open_file(path: Path, options: SourceOptions, progress: Callable[[str], None]) -> Checkpoint:
    """A file of tensors: in Meta's naming, or in that of a Hugging Face config beside it."""
    file = open_tensor_file(path)
    if _META_EMBEDDING in file.tensors:
        if options.adapter is not None:
            raise ParameterError("--adapter: adapters are trained on Hugging Face folders: give the base model's")
        return read_state_dict(path, options.state_dict)
    inner = next((name for name in file.tensors if name.endswith(f".{_META_EMBEDDING}")), None)
    if inner is not None:
        raise CheckpointError(
            f"{path}: its tensors lie within another module ({inner}): save the state_dict of the model itself"
        )
    return read_file(path, options.state_dict.config, options.state_dict.tokenizer, _adapter(options, progress))


def _adapter(options: SourceOptions, progress: Callable[[str], None]) -> Adapter | None:
    if options.adapter is None:
        return None
    if _is_id(options.adapter):
        return open_adapter(fetch_adapter(options.adapter, progress), name=options.adapter)
    if not Path(options.adapter).is_dir():
        raise CheckpointError(f"--adapter {options.adapter}: no such folder")
    return open_adapter(Path(options.adapter))


def _refuse_options(source: str, options: SourceOptions) -> None:
    if options.adapter is not None:
        raise ParameterError(
            f"--adapter: {source} is no Hugging Face folder; give the folder of the adapter's base model"
        )
    _refuse_state_dict_options(source, options)


def _refuse_state_dict_options(source: str, options: SourceOptions) -> None:
    for field in dataclasses.fields(options.state_dict):
        if field.name != "max_seq_len" and getattr(options.state_dict, field.name) is not None:
            flag = f"--{field.name.replace('_', '-')}"
            raise ParameterError(f"{flag}: {source} says that itself; the option is for bare state dicts")

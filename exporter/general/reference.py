"""Records the logits of transformers' own model in a file; see `exporter.validation.reference`.

The model's code is not changed in any way, so that what the general route replaces is compared with what it replaces.
A small model is also loaded by transformers; of a larger one, layers are loaded one after another, for several windows
at a time.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llm_edge.exporter.general.architecture import create_without_values
from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.independent import from_pretrained, silence_transformers
from llm_edge.exporter.validation.reference import ReferenceLogits
from llm_edge.exporter.validation.windows import cached_run, scoring_runs
from llm_edge.runtime.errors import CheckpointError

MAX_BYTES = 4_000_000_000
"""Of the float32 weights of a model that is loaded as a whole."""
_GROUP_TOKENS = 2048  # for which a layer is loaded once
_BEYOND = 32  # tokens after the longest window
_WINDOW = re.compile(r"window(_size)?$|attention_chunk_size$")


@dataclass(frozen=True, slots=True)
class LongText:
    """A text that is longer than every window of a model's attention.

    Attributes:
        tokens: of the text.
        logits: of its last positions, [positions, V].
    """

    tokens: tuple[int, ...]
    logits: Tensor


def record_general_reference(
    checkpoint: GeneralCheckpoint,
    windows: Sequence[Window],
    path: Path,
    progress: ItemProgress,
    max_bytes: int = MAX_BYTES,
) -> tuple[ReferenceLogits, LongText | None]:
    """Run transformers' model on the windows of a text, and record its logits in a file.

    If the windows of its attention are longer than those of the text, it also runs on a longer text.

    Raises:
        CheckpointError: transformers cannot load the model.
    """
    whole = 4 * checkpoint.config.parameters <= max_bytes
    groups = list(_groups(windows, 0 if whole else _GROUP_TOKENS))
    top, done = [], 0
    with path.open("wb") as file, silence_transformers(transformers), torch.inference_mode():
        model = load_reference(checkpoint) if whole else _loaded_by_layer(checkpoint)
        for group in groups:
            progress(done / len(windows), f"window {done + 1}")
            done += len(group)
            logits: Tensor = model(input_ids=torch.tensor([window.tokens for window in group]), use_cache=False).logits
            for each in logits:
                top.append(each.argmax(-1))
                each.float().numpy().astype("<f4", copy=False).tofile(file)
            del logits
        long_text = _run_long_text(model, checkpoint, windows)
    del model
    gc.collect()
    targets = [token for window in windows for token in (*window.tokens[1:], -1)]
    recorded = ReferenceLogits(
        path,
        checkpoint.config.vocab_size,
        scoring_runs(windows, checkpoint.config.vocab_size),
        tuple(window.kind for window in windows),
        cached_run(windows[0]),
        torch.tensor(targets),
        torch.cat(top),
        torch.empty(0),
    )
    return recorded, long_text


def longest_window(content: Mapping[str, Any]) -> int:
    """Return the largest window of attention that a config names; 0 if there is none."""
    return max((value for name, value in content.items() if _WINDOW.search(name) and type(value) is int), default=0)


def _run_long_text(model: Any, checkpoint: GeneralCheckpoint, windows: Sequence[Window]) -> LongText | None:
    """Run a text that is longer than every window, if the windows of the text are not and the context has room."""
    window = longest_window(checkpoint.config.config.to_dict())
    length = window + _BEYOND
    if max(len(each.tokens) for each in windows) >= length or length > checkpoint.config.max_position_embeddings:
        return None
    text = [token for each in windows for token in each.tokens]
    tokens = (text * (length // len(text) + 1))[:length]
    with contextlib.suppress(ValueError):  # some have no other attention than "eager", which takes more memory
        model.set_attn_implementation("sdpa")
    ids = torch.tensor([tokens])
    keep = {"logits_to_keep": _BEYOND} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **keep).logits
    return LongText(tuple(tokens), logits[0, -_BEYOND:].float())


def _groups(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Yield windows of one length together, up to this many tokens, in their order; at least one."""
    group: list[Window] = []
    for window in windows:
        same = group and len(group[0].tokens) == len(window.tokens)
        if group and (not same or (len(group) + 1) * len(window.tokens) > tokens):
            yield group
            group = []
        group.append(window)
    yield group


def load_reference(checkpoint: GeneralCheckpoint) -> Any:
    """Return the model as transformers loads it, in float32."""
    original = checkpoint.original
    assert original is not None
    config = checkpoint.config.config
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = None if original.folder is not None else {name: original.load(name) for name in original.names}
    try:
        model = from_pretrained(transformers, model_class, config, original.folder, tensors)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"transformers cannot load the model ({reason})") from error
    if model is None:
        raise CheckpointError("transformers does not find all tensors of the model")
    return model.eval()


def _loaded_by_layer(checkpoint: GeneralCheckpoint) -> Any:
    """Return the model with the weights of one layer in memory at a time, besides those outside of layers."""
    model = create_without_values(checkpoint.config.config)
    layers = _layers(model)
    inside = {f"{path}.{name}" for path, layer in layers.items() for name in layer.state_dict()}
    _fill(model, checkpoint.weights, "", [name for name in checkpoint.weights if name not in inside])
    for path, layer in layers.items():
        names = list(layer.state_dict())

        def load(module: nn.Module, _: Any, path: str = path, names: list[str] = names) -> None:
            _fill(module, checkpoint.weights, f"{path}.", names)

        layer.register_forward_pre_hook(load)
        layer.register_forward_hook(_release)
    return model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder layers by path: the items of the list of modules with most of the parameters."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {path: sum(parameter.numel() for parameter in module.parameters()) for path, module in lists.items()}
    outer = max(sizes, key=lambda path: (sizes[path], -len(path)))
    return {f"{outer}.{number}": layer for number, layer in enumerate(lists[outer])}


def _fill(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, names: Sequence[str]) -> None:
    """Give parameters and buffers of a module their values, as float32; tied ones are one tensor."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        value = weights[f"{prefix}{name}"]
        value = value.float() if value.is_floating_point() else value
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[attribute] = value


def _release(module: nn.Module, *_: Any) -> None:
    """Free the parameters of a layer."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

"""Runs transformers' own model on several windows of a text, all through one layer before any enters the next.

The weights of a layer are then in memory once, whatever the number of windows. The model's code is not changed: each
window runs in a thread of its own, which waits in front of every layer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_edge.exporter.general.architecture import create_without_values
from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.general.functions import UnsupportedModelError
from llm_edge.exporter.memory import return_freed_pages


class LayerwiseModel:
    """transformers' own model with the weights of one layer in memory at a time, besides those outside of layers.

    Args:
        checkpoint: of the model.
        with_head: whether to read the output head; without it, calls end in front of it.

    Attributes:
        model: transformers' model.
        layers: its decoder layers by path.
    """

    def __init__(self, checkpoint: GeneralCheckpoint, *, with_head: bool) -> None:
        self._weights = checkpoint.weights
        self.model: Any = create_without_values(checkpoint.config.config)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # the default copies the weights of all experts
        self.layers = _layers(self.model)
        skipped = {f"{path}.{name}" for path, layer in self.layers.items() for name in layer.state_dict()}
        tied = {target: source for target, source in self.model.all_tied_weights_keys.items() if target not in skipped}
        if not with_head:
            head = self.model.get_output_embeddings()
            head.register_forward_pre_hook(_end)
            skipped |= {f"{path}.weight" for path, module in self.model.named_modules() if module is head}
        _fill(self.model, self._weights, "", [name for name in self._weights if name not in {*skipped, *tied}])
        for target, source in tied.items():
            owner, _, name = target.rpartition(".")
            setattr(self.model.get_submodule(owner), name, self.model.get_parameter(source))

    def run(self, calls: Sequence[Callable[[], None]]) -> Iterator[tuple[str, nn.Module, Callable[[], None]]]:
        """Make calls of the model; yields each layer with its path, loaded, and what runs all calls through it.

        What runs them must be called before the next layer is asked for. This can be done once.

        Raises:
            UnsupportedModelError: the model runs a layer twice, or not in the order of the layers.
        """
        numbers = {layer: number for number, layer in enumerate(self.layers.values())}
        with contextlib.ExitStack() as cleanup:
            for layer in numbers:
                cleanup.callback(layer.register_forward_pre_hook(lambda layer, _: _pause(numbers[layer])).remove)
            threads = [_Call(call) for call in calls]
            for thread in threads:
                cleanup.callback(thread.stop)
                thread.advance()
            embedding = self.model.get_input_embeddings()  # all calls have used it
            _release(embedding)  # a tied head keeps the weight
            cleanup.callback(embedding.register_forward_pre_hook(_refuse_repetition).remove)
            for number, (path, layer) in enumerate(self.layers.items()):
                _fill(layer, self._weights, f"{path}.", list(layer.state_dict()))
                yield path, layer, lambda number=number: _advance(threads, number)  # type: ignore[misc]
                _release(layer)
                return_freed_pages()


class _Stopped(BaseException):
    """Ends a call that is no longer needed."""


class _Call(threading.Thread):
    """A call of the model, which waits in front of every layer.

    Attributes:
        layer: number of the layer in front of which the call waits; None once it has ended.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.layer: int | None = None
        self._call = call
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Make the call."""
        try:
            self._wait()
            with torch.inference_mode():  # holds for one thread
                self._call()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits for this one)
            self._error = error
        self.layer = None
        self._paused.release()

    def advance(self) -> None:
        """Continue up to the next layer, or to the end; raises what the call raises."""
        self._resume.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def pause(self, number: int) -> None:
        """Wait in front of a layer, in the thread itself."""
        self.layer = number
        self._paused.release()
        self._wait()

    def stop(self) -> None:
        """End the call."""
        self._stopping = True
        self._resume.release()
        self.join()

    def _wait(self) -> None:
        self._resume.acquire()
        if self._stopping:
            raise _Stopped


def _end(*_: Any) -> None:
    raise _Stopped


def _pause(number: int) -> None:
    thread = threading.current_thread()
    assert isinstance(thread, _Call)
    thread.pause(number)


def _advance(threads: Sequence[_Call], number: int) -> None:
    """Run all calls through a layer."""
    for thread in threads:
        if thread.layer == number:
            thread.advance()
        if thread.layer is not None and thread.layer <= number:
            _refuse_repetition()


def _refuse_repetition(*_: Any) -> None:
    raise UnsupportedModelError("it runs its layers several times, or in another order")


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


def _release(module: nn.Module) -> None:
    """Free the parameters of a module."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

"""`finetune`: a whole run, from checkpoint and data file to a saved model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.source import bundle_name
from llm_edge.finetune.checkpoint_files import FOLDER, CheckpointFiles, Progress, remove_partial_files
from llm_edge.finetune.data.encoding import ConversationEncoder, prompt_processor
from llm_edge.finetune.data.load import load_samples
from llm_edge.finetune.data.problems import counted
from llm_edge.finetune.data.sample import Dataset
from llm_edge.finetune.distributed import Processes, gather, processes, shard, under_torchrun
from llm_edge.finetune.find_lr import TRIALS, Trial, find_learning_rate
from llm_edge.finetune.memory import available_memory, check_fit, estimate, return_freed_memory
from llm_edge.finetune.options import FinetuneOptions, Method, with_stored
from llm_edge.finetune.packing import Plan
from llm_edge.finetune.preparation import prepare, trained_parameters
from llm_edge.finetune.report import Display, Listeners, TensorBoard, duration, save_plot
from llm_edge.finetune.saving import save_adapter, save_model, writing
from llm_edge.finetune.source import open_model, state_dict_options
from llm_edge.finetune.training import Listener, total_steps, train
from llm_edge.model.decoder import Decoder, count_parameters
from llm_edge.runtime.errors import InputError, MachineError, ParameterError
from llm_edge.runtime.file_lock import locked

_REMEDY = "lower --row-tokens, or add --gradient-checkpointing"
_NO_INFLUENCE = {
    "output",
    "resume",
    "force",
    "device",
    "threads",
    "tensorboard",
    "sample_answers",
    "save_every",
    "merge",
    "export",
    "shard",
}
"""Options that a resumed run may change, because they do not influence the weights beyond rounding."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        output: folder of the trained model.
        adapter: folder of the LoRA adapter, or None.
        model: whether `output` holds a whole model.
        progress: steps and evaluations.
        dataset: the data.
    """

    output: Path
    adapter: Path | None
    model: bool
    progress: Progress
    dataset: Dataset


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What training and the search for a learning rate have in common."""

    checkpoint: Checkpoint
    dataset: Dataset
    plan: Plan
    decoder: Decoder
    display: Display


def finetune(model: str, data: Path, options: FinetuneOptions) -> Result | None:
    """Train a model and save it in the output folder.

    Args:
        model: checkpoint, as for llm-export.
        data: JSONL file of conversations.
        options: see `FinetuneOptions`.

    Returns:
        the result; None in all processes of torchrun but the first.

    Raises:
        InputError: model, data or an option cannot be used; nothing is written.
        MachineError: memory or disk is full; the last checkpoint is intact.
        KeyboardInterrupt: the run was interrupted; `resume` continues it.
    """
    output = output_folder(model, options)
    _check_output(output, options)
    if options.export and not (options.merge or options.method is Method.FULL):
        raise ParameterError("--export needs the merged model: omit --no-merge")
    if options.train_token and not options.merge:
        raise ParameterError(
            "--train-token needs the merged model, because an adapter has no embeddings: omit --no-merge"
        )
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ParameterError("--tensorboard needs tensorboard: pip install tensorboard")
    if options.shard and (not under_torchrun() or options.train_token):
        raise ParameterError("--shard needs processes started by torchrun, and does not support --train-token")
    device = _device(options)
    with processes(device) as group, _out_of_memory():
        found = _prepare(model, data, options, "cpu" if options.shard else device)
        if group.is_first:
            _show_description(found, options, total_steps(found.plan, options))
        if options.shard:
            group = shard(found.decoder, group, device)
        elif group.is_first:
            _check_memory(found, options, device)
        with _claimed(output, options, group):
            return _train(found, output, model, options, group)


def interrupted_options(model: str, options: FinetuneOptions, given: Collection[str]) -> FinetuneOptions:
    """Return the options of the interrupted run in the output folder, except for the given ones.

    Raises:
        InputError: the run's checkpoint is damaged.
    """
    files = CheckpointFiles(output_folder(model, options), {})
    return with_stored(options, files.stored_settings(), given)


def find_lr(model: str, data: Path, options: FinetuneOptions) -> float:
    """Return a learning rate suggested by a range test; nothing is written.

    Raises:
        InputError: model, data or an option cannot be used.
        MachineError: not enough memory.
    """
    device = _device(options)
    with _out_of_memory():
        found = _prepare(model, data, options, device)
        _show_description(found, options, TRIALS)
        _check_memory(found, options, device)
        found.display.message(f"the learning rate rises in each of at most {TRIALS} steps, until the loss diverges")
        started = time.monotonic()

        def show(trial: Trial) -> None:
            left = (time.monotonic() - started) / trial.number * (TRIALS - trial.number)
            found.display.message(
                f"learning rate {trial.learning_rate:.1e}  loss {trial.loss:.4f}  at most {duration(left)} left"
            )

        return find_learning_rate(found.decoder, found.plan, options, show)[0]


def _prepare(model: str, data: Path, options: FinetuneOptions, device: str) -> _Prepared:
    return_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = open_model(model, options)
    encoder = ConversationEncoder(prompt_processor(checkpoint), options.max_length)
    dataset = load_samples(data, encoder, options)
    if options.export and not dataset.evaluation:
        raise ParameterError("--export compares bundles on evaluation data: raise --evaluation, or add conversations")
    display = Display(lambda ids: encoder.prompts.tokenizer.decode(ids, skip_special=False), device)
    plan = Plan(dataset.train, options.batch_size, options.row_tokens, options.seed)
    check_fit(4 * count_parameters(checkpoint.config), available_memory("cpu"), "train a smaller model")
    decoder = prepare(checkpoint, options, device)
    return _Prepared(checkpoint, dataset, plan, decoder, display)


def _train(found: _Prepared, output: Path, model: str, options: FinetuneOptions, group: Processes) -> Result | None:
    settings = _settings(model, found.plan, options)
    files = CheckpointFiles(output, settings)
    display = found.display
    listener: Listener = Listener()
    if group.is_first:
        listener = Listeners(display, *([TensorBoard(files.folder / "tensorboard")] if options.tensorboard else []))
    try:
        progress = train(found.decoder, found.plan, found.dataset.evaluation, options, files, listener, group)
    except KeyboardInterrupt:
        if group.is_first and files.exists:
            display.message(f"the checkpoint is saved in {files.folder}: continue with the same command and --resume")
        raise
    if group.sharded:
        gather(found.decoder)
    if not group.is_first:
        return None
    adapter = output / "adapter" if options.method is Method.LORA and not options.train_token else None
    whole = options.merge or adapter is None
    if adapter is not None:
        save_adapter(adapter, found.decoder, found.checkpoint, model)
    if whole:
        save_model(output, found.decoder, found.checkpoint, state_dict_options(options), Path(model))
    with writing(files.folder):
        save_plot(files.folder / "loss.svg", progress)
    return Result(output, adapter, whole, progress, found.dataset)


def output_folder(model: str, options: FinetuneOptions) -> Path:
    """Return the folder that a run writes."""
    return options.output or Path("artifacts") / f"{bundle_name(model)}-tuned"


def _show_description(found: _Prepared, options: FinetuneOptions, steps: int) -> None:
    dataset, plan, show = found.dataset, found.plan, found.display.message
    trained = sum(parameter.numel() for parameter in trained_parameters(found.decoder).values())
    show(
        f"{found.checkpoint.source.name}: training {trained / 1e6:,.1f} M of "
        f"{count_parameters(found.checkpoint.config) / 1e6:,.1f} M weights ({options.method.value}), "
        f"{counted(steps, 'step')} of {counted(min(plan.batch_size, len(plan.samples)), 'conversation')}"
    )
    show(
        f"data: {counted(len(dataset.train), 'sample')} to train on, {len(dataset.evaluation):,} to evaluate; "
        f"{counted(dataset.duplicates, 'duplicate')}, {dataset.cut:,} cut, {dataset.skipped:,} skipped"
    )
    for note in (*found.checkpoint.notes, *dataset.notes):
        show(f"note: {note}")


def _check_memory(found: _Prepared, options: FinetuneOptions, device: str) -> None:
    needed = estimate(
        found.decoder,
        found.plan.longest_row,
        checkpointing=options.gradient_checkpointing,
        precision=options.precision,
        document_tokens=found.plan.longest_sample,
        accumulates=found.plan.accumulates,
    )
    check_fit(needed.total, available_memory(device), _REMEDY)
    found.display.message(f"memory: about {needed.total / 1e9:.1f} GB besides the weights")


def _settings(model: str, plan: Plan, options: FinetuneOptions) -> dict[str, Any]:
    """Return what determines the weights of a run, as JSON values."""
    values = {key: value for key, value in dataclasses.asdict(options).items() if key not in _NO_INFLUENCE}
    simple = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return {"model": model, "data": plan.fingerprint(), **simple}


def _check_output(output: Path, options: FinetuneOptions) -> None:
    """Raise InputError unless the folder can be created, or holds a run that may be continued or replaced."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} exists and is not a folder: choose another one with -o")
    is_run = CheckpointFiles(output, {}).exists
    if options.resume and not is_run:
        raise InputError(f"{output} has no checkpoint to resume: start without --resume")
    if is_run and not options.resume and not options.force:
        raise InputError(
            f"{output} has a fine-tuning run: continue it with --resume, replace it with --force, or choose another "
            "folder with -o"
        )
    if output.exists() and not is_run and any(path.name != FOLDER for path in output.iterdir()):
        raise InputError(f"{output} exists and is not a fine-tuning run: choose another folder with -o")


@contextlib.contextmanager
def _claimed(output: Path, options: FinetuneOptions, group: Processes) -> Iterator[None]:
    """Create the run's folder, empty unless it is resumed, and lock it."""
    if not group.is_first:
        yield
        return
    folder = output / FOLDER
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as free:
        if not free:
            raise InputError(f"{output} is in use by another llm-finetune: choose another folder with -o")
        with writing(output):
            remove_partial_files(folder)
            if not options.resume:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _device(options: FinetuneOptions) -> str:
    available = torch.cuda.is_available()
    device = options.device or ("cuda" if available else "cpu")
    if device not in ("cpu", "cuda"):
        raise ParameterError(f"--device is {device!a}; it must be cpu or cuda")
    if device == "cuda" and not available:
        raise ParameterError("--device cuda: no CUDA device is available to torch: use --device cpu")
    return device


@contextlib.contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not full:
            raise
        raise MachineError(f"not enough memory: {_REMEDY}") from error

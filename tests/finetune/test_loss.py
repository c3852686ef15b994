"""Loss and gradients: equal to transformers', by target tokens, and in chunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_data import decoder_of, samples, saved

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.fused import fuse
from llm_edge.finetune.loss import batch_loss, cross_entropy
from llm_edge.finetune.packing import Batch, Plan, pack
from llm_edge.finetune.step import recompute
from llm_edge.model.decoder import Decoder, RunLayer
from llm_edge.model.weights import restore_sources


def gradients(decoder: Decoder, rows: list[list[Sample]]) -> dict[str, Tensor]:
    """Gradients of the mean loss over the targets of all rows."""
    decoder.zero_grad()
    total = sum(sample.targets for row in rows for sample in row)
    for row in rows:
        (batch_loss(decoder, Batch.of(row)) / total).backward()
    return {name: weight.grad for name, weight in decoder.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["llama", "llama with biases, tied", "qwen3", "gemma3_text", "gpt2", "olmo2"])
@pytest.mark.parametrize("run", [None, recompute])
def test_loss_and_gradients_are_those_of_transformers(run: RunLayer | None, name: str, tmp_path: Path) -> None:
    model = families.model(name)
    checkpoint = read_folder(families.save(model, tmp_path))
    decoder, data = decoder_of(checkpoint), samples(6)
    fuse(decoder)
    found = batch_loss(decoder, Batch.of(data), run) / sum(sample.targets for sample in data)
    found.backward()

    width = max(len(sample.ids) for sample in data)
    ids = torch.tensor([[*sample.ids, *[0] * (width - len(sample.ids))] for sample in data])
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(data):
        for position, trained in enumerate(sample.trained):
            labels[row, position] = sample.ids[position] if trained else -100
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (width - len(sample.ids)) for sample in data])
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {key: weight.grad for key, weight in model.named_parameters()}
    for own, weight in decoder.named_parameters():
        sources = checkpoint.weights.sources(own)
        if weight.ndim == 1 and len(sources) == 1:  # the added 1 of gemma's norms is no part of the gradient
            restored = {sources[0].name: weight.grad}
        else:
            restored = restore_sources(checkpoint.config, own, sources, weight.grad)
        for key, ours in restored.items():
            assert (ours - theirs[key]).norm() <= 1e-5 * theirs[key].norm(), key


def test_masked_positions_contribute_exactly_nothing(tmp_path: Path) -> None:
    decoder = decoder_of(saved("llama", tmp_path)[1])
    ids = tuple(range(10, 30))
    answer = Sample(ids, tuple(position >= 19 for position in range(20)), 1)
    whole = batch_loss(decoder, Batch.of([answer]))
    logits, _ = decoder(torch.tensor([ids]), torch.ones(1, 20, dtype=torch.int64), decoder.empty_past())
    assert whole.item() == pytest.approx(F.cross_entropy(logits[0, 18:19], torch.tensor(ids[19:])).item(), rel=1e-6)


def test_05_gradients_do_not_depend_on_the_rows_of_a_step(tmp_path: Path) -> None:
    """1 x 8 and 8 x 1 samples of unequal lengths, and one row without targets."""
    decoder = decoder_of(saved("llama", tmp_path)[1])
    data = samples(8, shortest=5, longest=250)
    together, apart = gradients(decoder, [data]), gradients(decoder, [[sample] for sample in data])
    empty = Sample((5, 6, 7), (False, False, False), 9)
    also_empty = gradients(decoder, [*([sample] for sample in data), [empty]])
    for name, gradient in together.items():
        assert torch.isfinite(gradient).all()
        for other in (apart[name], also_empty[name]):
            assert (gradient - other).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 7 * 50, 1 << 20])
def test_chunked_cross_entropy_is_that_of_torch(
    chunk: int, softcap: float | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.finetune.loss.CHUNK", chunk)
    torch.manual_seed(0)
    hidden, head = torch.randn(33, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (33,))
    bias = torch.randn(50, requires_grad=True) if biased else None
    logits = F.linear(hidden, head, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    given = (hidden, head) if bias is None else (hidden, head, bias)
    expected = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum") * 3, given)
    found = cross_entropy(hidden, head, targets, softcap, bias) * 3
    for ours, theirs in zip(torch.autograd.grad(found, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert cross_entropy(hidden, head, targets, softcap, bias).item() * 3 == pytest.approx(found.item(), rel=1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def test_11_the_loss_never_holds_the_logits_of_all_positions() -> None:
    """Over a vocabulary of 49k, twice the targets need no further logits in memory."""
    vocabulary, width = 49_152, 16
    head = torch.randn(vocabulary, width)
    largest = []
    for count in (400, 800):
        hidden, targets = torch.randn(count, width, requires_grad=True), torch.randint(vocabulary, (count,))
        with LargestTensor() as seen:
            cross_entropy(hidden, head, targets).backward()
        largest.append(seen.elements)
    assert largest[0] == largest[1] <= 8 << 20
    assert largest[0] < 400 * vocabulary / 2


def test_packing_keeps_every_sample_once_and_within_the_limit() -> None:
    data = samples(50)
    rows = pack(data, 100)
    assert sorted(sample.line for row in rows for sample in row) == list(range(1, 51))
    assert all(sum(len(sample.ids) - 1 for sample in row) <= 100 for row in rows)
    assert len(rows) <= math.ceil(sum(len(sample.ids) for sample in data) / 100) + 3


def test_a_plan_trains_on_every_sample_once_per_epoch() -> None:
    plan = Plan(samples(10), 4, 100, seed=1)
    lines = [[sample.line for row in plan.rows(step) for sample in row] for step in range(6)]
    assert [len(each) for each in lines] == [4, 4, 2, 4, 4, 2]
    for epoch in (lines[:3], lines[3:]):
        assert sorted(line for step in epoch for line in step) == list(range(1, 11))
    assert lines[:3] != lines[3:]
    assert lines[1] == [sample.line for row in plan.rows(1) for sample in row]

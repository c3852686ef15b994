"""Differences and divergences of logits, computed with plain formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.compare import compare, score
from llm_edge.exporter.validation.reference import ReferenceLogits, record_reference
from llm_edge.exporter.validation.windows import Run

KINDS = ("prose", "code", "prose")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> ReferenceLogits:
    folder = tmp_path_factory.mktemp("compare")
    checkpoint = read_folder(tiny.save_checkpoint(folder / "model"))
    generator = torch.Generator().manual_seed(0)
    windows = [
        Window(tuple(torch.randint(300, (length,), generator=generator).tolist()), kind)
        for length, kind in zip((90, 40, 7), KINDS, strict=True)
    ]
    return record_reference(checkpoint.config, checkpoint.weights, windows, folder / "logits")


class Noisy:
    """A model whose logits are those of the reference plus noise of a given size, by position."""

    def __init__(self, expected: ReferenceLogits, size: float) -> None:
        self.expected = expected
        count = len(expected.targets)
        noise = torch.randn(count, expected.vocab_size, generator=torch.Generator().manual_seed(1))
        self.logits = expected.logits(0, count) + size * noise

    def __call__(self, runs: Sequence[Run]) -> Iterator[Tensor]:
        for run in runs:
            for start, chunk in run.starts():
                yield self.logits[start : start + len(chunk)].clone()


def test_the_figures_are_those_of_the_definitions(expected: ReferenceLogits) -> None:
    model = Noisy(expected, 0.5)
    parity, quality = score(expected, model)
    reference, found = (
        logits.double().log_softmax(-1) for logits in (expected.logits(0, len(expected.targets)), model.logits)
    )
    scored = expected.targets >= 0
    divergence = (reference.exp() * (reference - found)).sum(-1)
    assert quality.tokens == 89 + 39 + 6 == int(scored.sum())
    assert quality.kl_mean == pytest.approx(divergence[scored].mean().item(), rel=1e-4)
    assert quality.kl_p999 == pytest.approx(divergence[scored].quantile(0.999).item(), rel=1e-4)
    assert quality.top1 == pytest.approx((reference.argmax(-1) == found.argmax(-1))[scored].double().mean().item())
    loss = -found.gather(1, expected.targets.clamp(min=0)[:, None])[scored].mean()
    assert quality.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    code = torch.zeros(137, dtype=torch.bool)
    code[90:130] = True
    assert quality.kl_by_kind == pytest.approx(
        {"prose": divergence[scored & ~code].mean().item(), "code": divergence[scored & code].mean().item()}, rel=1e-4
    )
    difference = (model.logits - expected.logits(0, len(model.logits))).abs()
    assert parity.prefill.max == difference[:90].max().item()
    assert parity.prefill.mean == pytest.approx(difference[:90].mean().item(), rel=1e-5)
    assert parity.steps is not None
    assert parity.chunk is not None
    assert (parity.steps.max, parity.chunk.max) == (difference[45:61].max().item(), difference[61:90].max().item())


def test_the_reference_itself_has_no_divergence(expected: ReferenceLogits) -> None:
    parity, quality = score(expected, Noisy(expected, 0.0))
    assert parity.worst.max == 0
    assert (quality.kl_mean, quality.top1) == (0, 1)
    assert quality.perplexity == quality.perplexity_reference


@pytest.mark.parametrize(("position", "part"), [(3, "prefill"), (50, "steps"), (70, "chunk")])
def test_nan_in_any_position_is_reported(expected: ReferenceLogits, position: int, part: str) -> None:
    model = Noisy(expected, 0.0)
    model.logits[position, 5] = float("nan")
    parity = compare(expected, model)
    assert not getattr(parity, part).within_bounds
    assert not parity.within_bounds
    assert parity.worst.max != parity.worst.max


def test_logits_are_those_of_the_decoder_at_once(expected: ReferenceLogits, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = tiny.save_checkpoint(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        for run in expected.windows:
            wanted = model(torch.tensor([run.tokens])).logits[0]
            assert (wanted - expected.logits(run.offset, len(wanted))).abs().max() < 1e-5

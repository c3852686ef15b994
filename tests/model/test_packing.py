"""Packed documents: they compute what each computes alone, and do not see each other (check 7)."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.model.attention import Documents
from llm_edge.model.decoder import Decoder

LENGTHS = (40, 1, 25, 90)  # longer and shorter than the windows and than the original context of the scaled ropes


def load(name: str, folder: Path) -> Decoder:
    checkpoint = read_folder(families.save(families.model(name), folder / "model"))
    decoder = Decoder(checkpoint.config)
    decoder.load_weights(checkpoint.weights)
    return decoder


def logits(decoder: Decoder, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return decoder.lm_head(decoder.normalize(decoder.forward_packed(ids, Documents(lengths))))


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", families.CASES)
def test_07_packed_documents_have_the_logits_and_gradients_of_separate_ones(name: str, tmp_path: Path) -> None:
    decoder = load(name, tmp_path)
    ids = ids_of(sum(LENGTHS))
    with torch.no_grad():
        alone = [decoder(part[None], torch.ones(1, len(part), dtype=torch.int64), decoder.empty_past())[0][0]
                 for part in torch.split(ids, LENGTHS)]  # fmt: skip
    together = logits(decoder, ids, LENGTHS)
    scale = torch.cat(alone).std()
    torch.testing.assert_close(together / scale, torch.cat(alone) / scale, atol=1e-5, rtol=0)

    together.square().mean().backward()
    packed = {key: value.grad for key, value in decoder.named_parameters()}
    decoder.zero_grad()
    for part in torch.split(ids, LENGTHS):
        (logits(decoder, part, (len(part),)).square().sum() / together.numel()).backward()
    for key, value in decoder.named_parameters():
        assert value.grad is not None
        assert (packed[key] - value.grad).norm() <= 1e-4 * value.grad.norm()


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3, longrope on a part of each head", "gpt2"])
def test_07_changing_one_document_leaves_the_logits_of_the_others(name: str, tmp_path: Path) -> None:
    decoder = load(name, tmp_path)
    first, second = ids_of(sum(LENGTHS)), ids_of(sum(LENGTHS), seed=1)
    second[LENGTHS[0] :] = first[LENGTHS[0] :]
    with torch.no_grad():
        before, after = logits(decoder, first, LENGTHS), logits(decoder, second, LENGTHS)
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert (before - after)[LENGTHS[0] :].abs().max() <= 1e-6

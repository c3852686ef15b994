"""Weight tables in both directions: saving returns the tensors that were read."""

from __future__ import annotations

from pathlib import Path

import families
import original
import pytest
import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.meta.checkpoint import read_state_dict
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.model.weights import restore_sources


def restored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    weights = checkpoint.weights
    found = {}
    for name in weights:
        found |= restore_sources(checkpoint.config, name, weights.sources(name), weights[name])
    return found


@pytest.mark.parametrize("name", families.CASES)
def test_restoring_returns_the_tensors_of_the_folder(name: str, tmp_path: Path) -> None:
    checkpoint = read_folder(families.save(families.model(name), tmp_path))
    assert checkpoint.original is not None
    for key, tensor in restored(checkpoint).items():
        torch.testing.assert_close(tensor, checkpoint.original.load(key), rtol=3e-7, atol=3e-7)


def test_restoring_returns_metas_interleaved_rows(tmp_path: Path) -> None:
    saved = original.save_family(tmp_path / "family")
    found = restored(read_state_dict(saved.path, StateDictOptions()))
    state = saved.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)

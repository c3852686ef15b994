"""Absurd configs are rejected quickly, before anything of their size is allocated."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.runtime.errors import CheckpointError

DEEP: Any = {}
for _ in range(500):
    DEEP = {"rope_type": DEEP}

ABSURD: dict[str, dict[str, Any]] = {
    "countless layers": {"num_hidden_layers": 10**9},
    "layers beyond any number": {"num_hidden_layers": 10**4000},
    "far too many layers": {"num_hidden_layers": 1024},
    "layers of all sizes": {"num_hidden_layers": 1024, "hidden_size": 65_536, "intermediate_size": 1_048_576},
    "no layer": {"num_hidden_layers": 0},
    "layers below none": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 0.5},
    "a vocabulary of all words": {"vocab_size": 2**62},
    "no vocabulary": {"vocab_size": 0},
    "a vocabulary of lists": {"vocab_size": [[[[[[[[]]]]]]]]},
    "a wide model": {"hidden_size": 65_536},
    "a wider model": {"hidden_size": 10**15},
    "a model of infinite width": {"hidden_size": float("inf")},
    "a model of no width": {"hidden_size": float("nan")},
    "many heads": {"num_attention_heads": 4096},
    "heads beyond memory": {"num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 4096},
    "no heads": {"num_attention_heads": 0},
    "heads below none": {"num_attention_heads": -4},
    "more keys than queries": {"num_key_value_heads": 8},
    "heads of a million": {"head_dim": 10**6},
    "a context of a century": {"max_position_embeddings": 10**12},
    "tables beyond memory": {"max_position_embeddings": 2_000_000, "head_dim": 4096},
    "an epsilon of one word": {"rms_norm_eps": "small"},
    "a negative epsilon": {"rms_norm_eps": -1e300},
    "a base of nothing": {"rope_parameters": {"rope_theta": 0}},
    "a base of everything": {"rope_parameters": {"rope_theta": 10**400}},
    "a factor of everything": {"rope_parameters": {"rope_type": "linear", "factor": float("inf")}},
    "a million factors": {
        "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 10**6, "short_factor": [1.0]}
    },
    "a scaling in a scaling": {"rope_parameters": DEEP},
    "scaling by name of a module": {"rope_parameters": {"rope_type": "os.system"}},
    "a family by name of a module": {"model_type": "os.path"},
    "a family of a megabyte": {"model_type": "llama" * 200_000},
    "an activation by name of a function": {"hidden_act": "torch.load"},
    "a list of a billion windows": {
        "model_type": "gpt_neo",
        "attention_types": [[["global"] * 4000, 10**9]],
        "num_heads": 4,
    },
    "layer types for missing layers": {"model_type": "qwen2", "layer_types": ["full_attention"] * 100_000},
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_config_is_rejected_quickly(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "absurd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **ABSURD[name]}))
    seconds = []
    for _ in range(3):  # the fastest run measures the work, the others the load of the machine
        began = time.process_time()
        with pytest.raises(CheckpointError) as refusal:
            read_folder(folder)
        seconds.append(time.process_time() - began)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 600
    assert min(seconds) < 0.5  # whatever has the config's size would take far longer


def test_there_are_thirty_absurd_configs() -> None:
    assert len(ABSURD) >= 30

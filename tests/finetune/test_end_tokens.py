"""Answers end: a model that has learned some rows stops after each of them."""

from __future__ import annotations

from pathlib import Path

import tiny
from chat_data import encoder_of, samples_of, write_rows

from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune.evaluation import answer
from llm_edge.finetune.options import FinetuneOptions, Method
from llm_edge.finetune.run import finetune
from llm_edge.model.decoder import Decoder


def test_03_after_overfitting_20_rows_20_of_20_answers_stop(tmp_path: Path) -> None:
    model = tiny.save_checkpoint(tmp_path / "model")  # pads with its end token
    rows = [{"data": [f"What is {n}?", f"It is {n * 37 % 100}, of course."]} for n in range(20)]
    options = FinetuneOptions(
        output=tmp_path / "trained",
        method=Method.FULL,
        evaluation=0,
        learning_rate=5e-3,
        steps=200,
        batch_size=20,
        threads=2,
    )
    assert finetune(str(model), write_rows(tmp_path / "data.jsonl", rows), options) is not None
    trained = open_checkpoint(str(tmp_path / "trained"), SourceOptions(), lambda _: None)
    decoder = Decoder(trained.config)
    decoder.load_weights(trained.weights)
    encoder = encoder_of(model)
    answers = [answer(decoder, sample) for row in rows for sample in samples_of(encoder, row)]
    stopped = [found.generated[-1] in encoder.prompts.end_tokens for found in answers]
    assert stopped.count(True) == 20
    assert sum(found.generated == found.expected for found in answers) >= 18

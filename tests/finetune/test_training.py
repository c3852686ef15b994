"""Training: processes, memory, precision, evaluation, schedule (checks 6, 10, 12, 15 and 19)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from project import ROOT
from safetensors.torch import load_file
from tiny_training import OPTIONS, run, tiny_decoder
from training_data import samples

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.finetune.checkpoint_files import FOLDER, CheckpointFiles
from llm_edge.finetune.distributed import Processes
from llm_edge.finetune.evaluation import Answer, answer, evaluation_loss
from llm_edge.finetune.find_lr import Trial, find_learning_rate, suggest
from llm_edge.finetune.options import FinetuneOptions, Precision, Schedule
from llm_edge.finetune.packing import Plan
from llm_edge.finetune.preparation import prepare, trained_parameters
from llm_edge.finetune.saving import save_model
from llm_edge.finetune.schedule import learning_rate_factor
from llm_edge.finetune.step import accumulate, autocast
from llm_edge.finetune.training import Listener, Step, train
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import ParameterError

SUPPORT = ROOT / "tests" / "support"


@pytest.mark.parametrize("mode", [(), ("shard",)])
def test_06_two_processes_reach_the_weights_of_one(mode: tuple[str, ...], tmp_path: Path) -> None:
    alone, _ = run(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, SUPPORT / "tiny_training.py", tmp_path / "two", *mode],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "two" / ("gathered.safetensors" if mode else f"{FOLDER}/best.safetensors"))
    moved = tiny_decoder()
    for name, weight in alone.named_parameters():
        assert (found[name] - weight).abs().max() <= 1e-5, name
        assert not torch.equal(weight, moved.get_parameter(name))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through /proc")
def test_10_19_memory_of_checkpointing_and_evaluation_is_lower_and_forecast() -> None:
    """At 1,024 tokens: checkpointing needs 30 % less, evaluation no more than training; the estimates before the first
    step are within 15 % of what is used.
    """
    llama = ["llama-lora-fp32-plain", "llama-lora-fp32-checkpointing", "llama-full-fp32-plain"]
    others = ["gemma-full-bf16-checkpointing"]
    command = [sys.executable, SUPPORT / "training_memory.py", *llama, *others, "llama-lora-fp32-evaluation"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, checkpointing = (found[case] for case in llama[:2])
    assert checkpointing["used"] <= 0.7 * plain["used"]
    assert found["llama-lora-fp32-evaluation"]["used"] <= checkpointing["used"]
    for case in (*llama, *others):
        assert found[case]["estimate"] == pytest.approx(found[case]["used"], rel=0.15), (case, found)


@pytest.mark.parametrize("lora", [False, True])
def test_10_checkpointing_computes_bit_equal_gradients(lora: bool) -> None:
    found = []
    for checkpointing in (False, True):
        decoder = tiny_decoder(lora=lora)
        options = FinetuneOptions(gradient_checkpointing=checkpointing)
        accumulate(decoder, [samples(4), samples(3, seed=1)], options, Processes(), lambda: False)
        found.append({name: parameter.grad for name, parameter in trained_parameters(decoder).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_12_bf16_keeps_weights_and_states_in_float32_and_moves_them(tmp_path: Path) -> None:
    before = tiny_decoder()
    after, progress = run(
        tmp_path, precision=Precision.BF16, learning_rate=1e-6, steps=100, evaluate_every=100, evaluation=0, warmup=0.0
    )
    assert progress.step == 100
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    stored = load_file(tmp_path / FOLDER / "last.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != "rng"} == {torch.float32}
    assert sum(name.startswith("exp_avg_sq/") for name in stored) == len(list(after.parameters()))
    pairs = [(weight, before.get_parameter(name)) for name, weight in after.named_parameters()]
    moved = sum(int((weight != old).sum()) for weight, old in pairs)
    assert moved > 0.9 * sum(weight.numel() for weight, _ in pairs)


def test_15_lora_trains_the_row_of_a_new_token_and_no_other(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    options = FinetuneOptions(train_token=["<|im_start|>"], steps=4, batch_size=4, learning_rate=1e-2, sample_answers=0)
    decoder = prepare(checkpoint, options, "cpu")
    plan = Plan(samples(8), 4, 200, 0)
    train(decoder, plan, [], options, CheckpointFiles(tmp_path / "run", {}), Listener(), Processes())
    save_model(tmp_path / "saved", decoder, checkpoint, StateDictOptions(), folder)

    again = read_folder(tmp_path / "saved")
    old, new = checkpoint.weights["embed_tokens.weight"], again.weights["embed_tokens.weight"]
    changed = [row for row in range(len(old)) if not torch.equal(old[row], new[row])]
    assert changed == [1]
    assert again.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_tokens_to_train_must_exist(tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path))
    with pytest.raises(ParameterError, match="--train-token '<new>' is not a token of the model"):
        prepare(checkpoint, FinetuneOptions(train_token=["<new>"]), "cpu")


def test_19_the_evaluation_loss_does_not_depend_on_the_rows() -> None:
    decoder, data = tiny_decoder(), samples(12)
    losses = [evaluation_loss(decoder, data, tokens, Processes()) for tokens in (1, 100, 10_000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


class Recorder(Listener):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.evaluations: list[tuple[int, float, bool, Sequence[Answer]]] = []

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_evaluation(self, step: int, loss: float, best: bool, answers: Sequence[Answer]) -> None:
        self.evaluations.append((step, loss, best, answers))


def test_a_run_reports_steps_and_evaluations_and_lowers_the_loss(tmp_path: Path) -> None:
    seen = Recorder()
    _, progress = run(tmp_path, listener=seen, steps=20, evaluate_every=5, sample_answers=2)
    assert [step.number for step in seen.steps] == list(range(1, 21))
    assert seen.steps[-1].loss < seen.steps[0].loss
    assert [number for number, *_ in seen.evaluations] == [0, 5, 10, 15, 20]
    assert all(len(answers) == 2 for *_, answers in seen.evaluations)
    assert progress.best_loss == min(loss for _, loss, *_ in seen.evaluations)


def test_a_run_ends_with_the_weights_of_the_best_evaluation(tmp_path: Path) -> None:
    """Random answers cannot be learned: the evaluation loss rises while the training data is memorized."""
    decoder, progress = run(tmp_path, steps=60, evaluate_every=10)
    assert progress.best_step < 60
    assert progress.best_loss is not None
    assert evaluation_loss(decoder, samples(6, seed=9), 80, Processes()) == pytest.approx(progress.best_loss, rel=1e-6)


def test_a_run_stops_when_the_evaluation_loss_no_longer_falls(tmp_path: Path) -> None:
    _, progress = run(tmp_path, learning_rate=0.0, patience=2, evaluate_every=1)
    assert progress.stopped
    assert progress.step == 2


def test_a_loss_that_is_not_finite_ends_the_run_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"in step \d+: lower --learning-rate"):
        run(tmp_path, learning_rate=1e30, steps=5, clip=0.0, evaluation=0)


def test_03_twenty_of_twenty_overfitted_answers_end_with_their_end_token() -> None:
    decoder, data = tiny_decoder(), samples(20, shortest=6, longest=12)
    options = FinetuneOptions()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(120):
        accumulate(decoder, [data], options, Processes(), lambda: False)
        optimizer.step()
        optimizer.zero_grad()
    answers = [answer(decoder, sample) for sample in data]
    assert all(each.generated == each.expected for each in answers)
    assert [each.expected for each in answers] == [sample.answer for sample in data]


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, Schedule.COSINE) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10] == max(factors) == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert learning_rate_factor(99, 100, 0.1, Schedule.CONSTANT) == 1.0
    assert learning_rate_factor(0, 1, 0.0, Schedule.COSINE) == 1.0


def test_the_suggested_learning_rate_is_where_the_loss_falls_fastest() -> None:
    losses = [4.0, 4.0, 3.9, 3.5, 2.8, 2.6, 2.6, 5.0]
    trials = [Trial(index + 1, 10.0 ** (index - 6), loss) for index, loss in enumerate(losses)]
    assert suggest(trials) == pytest.approx(1e-3)
    with pytest.raises(ParameterError, match="did not fall"):
        suggest([Trial(1, 1e-6, 1.0), Trial(2, 1e-5, 2.0)])


def test_a_learning_rate_is_found_for_a_model() -> None:
    seen: list[Trial] = []
    plan = Plan(samples(20), 8, 200, 0)
    found, trials = find_learning_rate(tiny_decoder(), plan, FinetuneOptions(), seen.append)
    assert 1e-5 < found < 1e-1
    assert trials == seen


def test_autocast_computes_in_bf16_only_if_asked() -> None:
    decoder: Decoder = tiny_decoder()
    x = torch.ones(2, 32)
    for precision, dtype in ((Precision.FP32, torch.float32), (Precision.BF16, torch.bfloat16)):
        with autocast(decoder, precision):
            assert decoder.lm_head(x).dtype is dtype
    assert math.isclose(OPTIONS.peak_learning_rate, 1e-2)

"""What a run shows: progress lines, forecasts, answers and plots."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from llm_edge.finetune.checkpoint_files import Progress
from llm_edge.finetune.evaluation import Answer
from llm_edge.finetune.memory import available_memory, check_fit, estimate
from llm_edge.finetune.options import Precision
from llm_edge.finetune.report import Display, bar_plot, save_plot
from llm_edge.finetune.training import Step
from llm_edge.runtime.errors import MachineError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int) -> Step:
    return Step(number, 100, 1.25, 2e-4, 0.5, 500, 2.0)


def test_a_terminal_shows_loss_speed_and_time_left_in_one_line() -> None:
    stream = Terminal()
    Display(str, "cpu", stream).on_step(step(1))
    assert stream.getvalue() == "\r\x1b[Kstep 1/100  loss 1.2500  lr 2.0e-04  250 tokens/s  3:18 left"


def test_three_steps_give_a_forecast_of_time_and_memory() -> None:
    stream = io.StringIO()
    display = Display(str, "cpu", stream)
    for number in (41, 42, 43, 44):  # a resumed run
        display.on_step(step(number))
    assert stream.getvalue().startswith("about 1:54 for the remaining 57 steps")
    assert stream.getvalue().count("\n") == 1


def test_an_evaluation_shows_its_loss_and_answers_in_one_line_each() -> None:
    stream = io.StringIO()
    texts = {(1,): "Why?\n", (2,): "Because.", (3,): "x" * 500}
    answer = Answer((1,), (2,), (3,))
    Display(lambda ids: texts[tuple(ids)], "cpu", stream).on_evaluation(0, 2.5, True, [answer])
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["evaluation before training: loss 2.5000", "  question  Why?\\n", "  expected  Because."]
    assert len(lines[3]) < 200
    assert lines[3].endswith("…")


def test_bars_show_the_course_of_values() -> None:
    assert bar_plot([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert bar_plot([1.0, 1.0]) == "▁▁"
    assert bar_plot([]) == ""
    assert len(bar_plot([float(value) for value in range(1000)])) == 60


def test_the_losses_are_plotted_to_a_file(tmp_path: Path) -> None:
    progress = Progress(2, steps=[{"loss": 2.0}, {"loss": 1.0}], evaluations=[{"step": 0, "loss": 2.5}])
    assert save_plot(tmp_path / "loss.svg", progress)
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_a_run_that_does_not_fit_into_memory_is_refused_with_the_remedy() -> None:
    check_fit(10, None, "buy more")
    check_fit(10, 11, "buy more")
    with pytest.raises(MachineError, match=r"needs about 2\.0 GB of memory, but 1\.0 GB are free: buy more"):
        check_fit(2 * 10**9, 10**9, "buy more")
    available = available_memory("cpu")
    assert available is None or available > 0


def test_memory_is_estimated_for_the_precision_of_the_run() -> None:
    from tiny_training import tiny_decoder

    decoder = tiny_decoder()
    fp32, bf16 = (estimate(decoder, 1000, checkpointing=False, precision=each).row for each in Precision)
    assert bf16 < fp32

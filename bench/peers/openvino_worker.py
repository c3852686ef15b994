"""`worker.py` for OpenVINO GenAI: `python openvino_worker.py FOLDER THREADS`, run where openvino-genai is installed.

The pipeline runs with its defaults except for the prefix cache, which would answer a repeated prompt from memory. Its
logits are not accessible, so they are those of the same model compiled with the same settings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any


def main() -> None:
    """Load the folder and answer."""
    from serving import private_stdout, serve  # type: ignore[import-not-found]

    folder, settings = Path(sys.argv[1]), {"INFERENCE_NUM_THREADS": int(sys.argv[2])}
    replies = private_stdout()
    import numpy as np
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 2**31  # a prompt at once, the pipeline's default
    pipeline = None

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        """Records when tokens arrive."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: Any) -> Any:
            """One token, or several at once."""
            count = len(token) if isinstance(token, list) else 1
            self.times += [perf_counter()] * count
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """The generation is complete."""

    def generate(tokens: list[int], count: int) -> list[float]:
        nonlocal pipeline
        if pipeline is None:
            pipeline = genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **settings)
        config = genai.GenerationConfig(max_new_tokens=count, do_sample=False)
        clock = Clock()
        pipeline.generate(ov.Tensor(np.array([tokens], dtype=np.int64)), config, clock)
        return clock.times

    def logits(tokens: list[int]) -> Any:
        request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()
        count = len(tokens)
        inputs = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, count), dtype=np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        known = {name for node in request.model_inputs for name in node.names}
        request.infer({name: value for name, value in inputs.items() if name in known})
        return np.ascontiguousarray(request.get_tensor("logits").data, dtype="<f4").tobytes()

    serve(generate, logits, replies)


if __name__ == "__main__":
    main()

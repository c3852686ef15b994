"""`worker.py` for llama.cpp: `python llamacpp_worker.py FILE.gguf THREADS [no-flash|rows] [context=N]`.

Calls the C interface of llama-cpp-python; of the package only its ctypes declarations are imported, so that neither its
Python classes nor numpy count as llama.cpp's memory and start.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import types
from pathlib import Path
from time import perf_counter
from typing import Any

CONTEXT = 1024  # its cache is allocated at the start
BATCH = 512
ROWS = 16  # concurrent sequences in `rows` mode


def main() -> None:
    """Load the file and answer."""
    from serving import private_stdout, serve  # type: ignore[import-not-found]

    path, threads, replies = sys.argv[1], int(sys.argv[2]), private_stdout()
    lib = declarations()
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    model, context = load(lib, path, threads, sys.argv[3:])
    memory, vocab = lib.llama_get_memory(context), lib.llama_model_get_vocab(model)
    width = lib.llama_vocab_n_tokens(vocab)
    greedy = lib.llama_sampler_init_greedy()

    def decode(batch: Any) -> None:
        if (status := lib.llama_decode(context, batch)) != 0:
            sys.exit(f"error: llama_decode returned {status}")

    def generate(tokens: list[int], count: int) -> list[float]:
        lib.llama_memory_clear(memory, False)
        pending, times = batches(tokens), []
        while True:
            for new in pending:
                decode(lib.llama_batch_get_one(new, len(new)))
            token = lib.llama_sampler_sample(greedy, context, -1)
            times.append(perf_counter())
            if len(times) == count or lib.llama_vocab_is_eog(vocab, token):
                return times
            pending = batches([token])

    def logits(tokens: list[int]) -> Any:
        lib.llama_memory_clear(memory, False)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        decode(batch)
        lib.llama_batch_free(batch)
        rows = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * (len(tokens) * width)))
        return memoryview(rows.contents).cast("B")

    def rows(prompts: list[list[int]], count: int) -> float:
        """Like llama-batched-bench: steps over all sequences with logits of all, without sampling."""
        lib.llama_memory_clear(memory, False)
        batch = lib.llama_batch_init(BATCH, 0, 1)
        for row, prompt in enumerate(prompts):
            fill(batch, [(token, place, row) for place, token in enumerate(prompt)])
            decode(batch)
        lib.llama_synchronize(context)
        began = perf_counter()
        for number in range(count):
            fill(batch, [(prompt[number % len(prompt)], len(prompt) + number, i) for i, prompt in enumerate(prompts)])
            decode(batch)
            lib.llama_synchronize(context)
        took = perf_counter() - began
        lib.llama_batch_free(batch)
        return count * len(prompts) / took

    serve(generate, logits, replies, rows)


def batches(tokens: list[int]) -> list[Any]:
    """The tokens in arrays of at most `BATCH`."""
    parts = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
    return [(ctypes.c_int32 * len(part))(*part) for part in parts]


def load(lib: Any, path: str, threads: int, mode: list[str]) -> tuple[Any, Any]:
    """The model and a context; `mode` holds `rows` or `no-flash`, and `context=N` for a cache of N tokens."""
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    lengths = [int(word.partition("=")[2]) for word in mode if word.startswith("context=")]
    params.n_ctx, params.n_batch, params.n_ubatch = lengths[0] if lengths else CONTEXT, BATCH, BATCH
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    if "rows" in mode:
        params.n_ctx, params.n_seq_max = ROWS * CONTEXT, ROWS
    if "no-flash" in mode:
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        sys.exit(f"error: llama.cpp cannot load {path}")
    return model, context


def fill(batch: Any, entries: list[tuple[int, int, int]]) -> None:
    """Fill a batch with (token, position, sequence) entries; logits of each sequence's last token."""
    batch.n_tokens = len(entries)
    for i, (token, place, row) in enumerate(entries):
        last = i + 1 == len(entries) or entries[i + 1][2] != row
        batch.token[i], batch.pos[i], batch.logits[i] = token, place, last
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, row


def declarations() -> Any:
    """The module `llama_cpp.llama_cpp` without the rest of its package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("error: llama-cpp-python is not installed here")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


if __name__ == "__main__":
    main()

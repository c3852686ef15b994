"""Exports a tiny model of every causal language model in transformers and compares it: `make sweep`.

Each runs in its own process with a time limit, forked from one that has loaded the libraries. The last line counts
those that are exported and equal.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from llm_edge.exporter.families import GENERAL

SUPPORT = Path(__file__).resolve().parents[1] / "support"
BOUND = 1e-4  # of the difference of logits
_SECONDS = 600
_NOT_DECODERS = (  # encoders, parts of encoder-decoders and of models of sound, and models without autoregressive text
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "moshi", "moss_transcribe_diarize"),
    *("musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
    *("xlnet", "xmod", "git", "speech_to_text_2"),
)


def one(kind: str, results: Connection) -> None:
    """Send the result for one `model_type`, in a line."""
    from general_check import GREEDY, compare_export, run_quantized
    from general_models import save

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            with tempfile.TemporaryDirectory() as folder:
                source = save(kind, Path(folder) / "source")
                found = compare_export(source, Path(folder) / "target")
                if kind in GENERAL:
                    run_quantized(source, Path(folder) / "quantized")
        except BaseException as error:  # noqa: BLE001 (native libraries also raise exceptions outside of Exception)
            results.send(f"refused\t{' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")
            return
    equal = found.worst < BOUND and found.greedy == GREEDY
    figures = f"{found.whole:.1e} {found.steps:.1e} {found.batch:.1e} {found.greedy}/{GREEDY}"
    results.send(f"{'equal' if equal else 'WRONG'}\t{figures}\t{found.operators}")


def in_a_process(kind: str) -> tuple[str, str]:
    """A `model_type` and its result, or why there is none."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=one, args=(kind, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            return kind, f"refused\ttook more than {_SECONDS} s"
        return kind, str(receiver.recv())
    except EOFError:
        process.join()
        return kind, f"refused\tthe process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()


def main() -> None:
    """Check the named architectures, or all."""
    sys.path.insert(0, str(SUPPORT))
    import general_check  # noqa: F401 (the children inherit it)
    import general_models  # noqa: F401
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    torch.set_num_threads(1)
    kinds = sys.argv[1:] or [kind for kind in CLASSES if kind not in _NOT_DECODERS]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in concurrent.futures.as_completed([pool.submit(in_a_process, kind) for kind in kinds]):
            kind, result = done.result()
            results[kind] = result
            print(f"{kind}\t{result}", flush=True)
    equal = sorted(kind for kind, result in results.items() if result.startswith("equal"))
    wrong = sorted(kind for kind, result in results.items() if result.startswith("WRONG"))
    print(f"equal: {' '.join(equal)}")
    print(f"{len(equal)} of {len(results)} equal, {len(wrong)} wrong: {' '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

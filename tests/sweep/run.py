"""Exports a tiny model of every causal language model in transformers and compares it: `make sweep`.

Each runs in its own process with a time limit. The last line counts those that are exported and equal.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import tempfile
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
BOUND = 1e-4  # of the difference of logits
_SECONDS = 300
_NOT_DECODERS = (  # encoders, parts of encoder-decoders and of models of sound, and models without autoregressive text
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "moshi", "moss_transcribe_diarize"),
    *("musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
    *("xlnet", "xmod", "git", "speech_to_text_2"),
)


def one(kind: str) -> str:
    """The result for one `model_type`, in a line."""
    import torch
    from general_check import GREEDY, compare_export
    from general_models import save

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = save(kind, Path(folder) / "source")
        found = compare_export(source, Path(folder) / "target")
    equal = found.worst < BOUND and found.greedy == GREEDY
    figures = f"{found.whole:.1e} {found.steps:.1e} {found.batch:.1e} {found.greedy}/{GREEDY}"
    return f"{'equal' if equal else 'WRONG'}\t{figures}\t{found.operators}"


def in_a_process(kind: str) -> tuple[str, str]:
    """A `model_type` and its result, or why there is none."""
    command = [sys.executable, __file__, "--one", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return kind, f"refused\ttook more than {_SECONDS} s"
    if done.returncode == 0:
        return kind, done.stdout.strip().splitlines()[-1]
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return kind, f"refused\t{reason[:200]}"


def main() -> None:
    """Check the named architectures, or all."""
    sys.path.insert(0, str(SUPPORT))
    if sys.argv[1:2] == ["--one"]:
        print(one(sys.argv[2]))
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    kinds = sys.argv[1:] or [kind for kind in CLASSES if kind not in _NOT_DECODERS]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for kind, result in pool.map(in_a_process, kinds):
            results[kind] = result
            print(f"{kind}\t{result}", flush=True)
    equal = sum(result.startswith("equal") for result in results.values())
    wrong = [kind for kind, result in results.items() if result.startswith("WRONG")]
    print(f"{equal} of {len(results)} equal, {len(wrong)} wrong: {', '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

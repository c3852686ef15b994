"""`embed`: texts as vectors, for all protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.backend.session import HiddenStates
from llm_edge.server.errors import invalid
from llm_edge.server.models import LoadedModel, ModelPool


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of length 1, float32 [H] each, and the number of tokens they were computed from."""

    model: str
    vectors: Sequence[HiddenStates]
    tokens: int


async def embed(pool: ModelPool, model: str, inputs: Sequence[str | list[int]], pooling: str = "mean") -> Embedded:
    """Embed texts or token lists, one after the other.

    Raises:
        ApiError: there is no such model, or it was exported without hidden states.
        InputError: an input is empty or does not fit.
    """
    async with pool.use(model) as loaded:
        if loaded.engine.precision.hidden_size is None:
            message = f"model {loaded.name!r} has no embeddings: export it again with llm-export --hidden-states"
            raise invalid(message, "model")
        vectors, count = [], 0
        for each in inputs:
            vector, tokens = await run_in_threadpool(_vector, loaded, each, pooling)
            vectors.append(vector)
            count += tokens
        return Embedded(loaded.name, vectors, count)


def _vector(loaded: LoadedModel, text: str | list[int], pooling: str) -> tuple[HiddenStates, int]:
    tokens = loaded.engine.encode_prompt(text)
    with loaded.embedding:
        return loaded.embedder.embed(tokens, pooling, normalize=True), len(tokens)

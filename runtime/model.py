"""`Model`: a bundle that generates for one conversation at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.backend.watchdog import check_running_steps
from llm_edge.runtime.base_model import BaseModel
from llm_edge.runtime.errors import BundleError, StepTerminatedError, typed_errors
from llm_edge.runtime.generation import Generation
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.loading import LoadedBundle, load
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.scheduling.prefixes import WORTH_KEEPING, common_prefix

if TYPE_CHECKING:  # as in `base_model`
    from llm_edge.runtime.backend.session import HiddenStates
    from llm_edge.runtime.sampling.params import SamplingParams
    from llm_edge.runtime.scheduling.sequence import TokenSequence
    from llm_edge.runtime.score import Score
    from llm_edge.runtime.speculative.draft_model import DraftModel


class Model(BaseModel[Generation]):
    """A model for one conversation at a time.

    Starting a generation, from any thread, ends an unfinished one. The prefix that a prompt shares with the previous
    conversation is not computed again.
    """

    def __init__(self, loaded: LoadedBundle, draft: DraftModel | None = None) -> None:
        super().__init__(loaded, draft, speculative=True)
        self._session = loaded.session
        self._sequence_in_cache: TokenSequence | None = None
        self._running = threading.Event()  # set to cancel the current generation
        self._starting = threading.Lock()
        self._stepping = threading.Lock()

    @classmethod
    def load(cls, path: str | Path, precision: str | None = None, **options: Any) -> Model:
        """Load a bundle.

        Args:
            path: the folder.
            precision: one that the bundle contains; None = int8 if there is one, on CUDA fp16.
            options: further fields of `LoadOptions`: `provider`, `threads`, `verify`, `draft`, `draft_precision`,
                `step_seconds`.

        Raises:
            BundleError: a folder is missing, damaged or modified.
            ParameterError: an option is out of range, or the draft model does not match.
            InputError: a TorchScript bundle where torch is not installed.
            ProviderError: CUDA was requested and does not work here.
        """
        return cls.open(path, LoadOptions(precision, **options))

    @classmethod
    def open(cls, path: str | Path, options: LoadOptions) -> Model:
        """Like `load`, but with the options in a `LoadOptions`."""
        loaded = load(path, options, interleaved=options.draft is not None)
        from llm_edge.runtime.speculative.draft_model import load_draft_model

        return cls(loaded, load_draft_model(options, loaded))

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime (or torch) since the model was loaded."""
        return self._session.run_seconds + (self._draft.run_seconds if self._draft is not None else 0.0)

    def clear_cache(self) -> None:
        """Drop what earlier prompts computed; ends an unfinished generation."""
        self.check_process()
        self._replace(threading.Event())
        with self._stepping:
            self._sequence_in_cache = None
            if self._draft is not None:
                self._draft.clear_cache()

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probabilities of a text's tokens; ends an unfinished generation.

        Raises:
            ParameterError: it has fewer than two tokens, or ids outside the vocabulary.
            ContextLengthError: it does not fit.
        """
        from llm_edge.runtime.score import scored

        tokens = self._encode_to_compute(text)
        self.clear_cache()
        with self._stepping:
            self._session.cancel_steps_if(_never)
            self._session.clear_cache()
            return scored(tokens, lambda chunk: self._session.step(chunk, num_logits=0))

    def embed(self, text: str | Sequence[int], pooling: str = "mean", *, normalize: bool = False) -> HiddenStates:
        """A text as a vector, from the hidden states of its tokens after the last norm; ends an unfinished generation.

        Args:
            text: plain text, or token ids.
            pooling: `mean` over all tokens, the `last` token, or `none`.
            normalize: divide by the Euclidean norm.

        Returns:
            float32 [H]; [tokens, H] without pooling.

        Raises:
            ParameterError: unknown pooling; the text is empty or contains ids outside the vocabulary.
            ContextLengthError: it does not fit.
            BundleError: this precision was exported without hidden states.
        """
        from llm_edge.runtime.backend.session import Session
        from llm_edge.runtime.embed import check_pooling, pooled

        check_pooling(pooling)
        session = self._session
        if self.precision.hidden_size is None or not isinstance(session, Session):
            raise BundleError(
                f"{self.bundle.path}: {self.precision.name} has no hidden states: "
                "export it again, as ONNX, with llm-export --hidden-states"
            )
        tokens = self._encode_to_compute(text)
        self.clear_cache()
        with self._stepping:
            session.cancel_steps_if(_never)
            session.clear_cache()
            return pooled(tokens, session.hidden_states, pooling, normalize=normalize)

    def _start(self, tokens: list[int], params: SamplingParams | None, began: float) -> Generation:
        speculative = self.speculative and self._session.rewinds_in_place
        sequence = self._sequence(tokens, params or self.default_params, began, speculative=speculative)
        cancelled = threading.Event()
        self._replace(cancelled)
        return Generation(self._chunks(sequence, cancelled), cancelled, sequence.adjust, check_running_steps)

    def _replace(self, cancelled: threading.Event) -> None:
        """End the running generation; `cancelled` will end the next one."""
        with self._starting:
            self._running.set()
            self._running = cancelled
        check_running_steps()

    def _chunks(self, sequence: TokenSequence, cancelled: threading.Event) -> Iterator[GenerationChunk]:
        while not cancelled.is_set():
            for chunk in self._step(sequence, cancelled):
                if cancelled.is_set():
                    break
                yield chunk
                if chunk.finish_reason is not None:
                    return
        with typed_errors():
            last = sequence.finish(FinishReason.CANCELLED)
        yield last

    def _step(self, sequence: TokenSequence, cancelled: threading.Event) -> list[GenerationChunk]:
        """Run one step; returns nothing if the generation was cancelled."""
        with self._stepping:
            if cancelled.is_set():
                return []
            self._session.cancel_steps_if(cancelled.is_set)
            if self._draft is not None:
                self._draft.cancel_steps_if(cancelled.is_set)
            try:
                with typed_errors():
                    return self._advance(sequence)
            except BaseException as error:
                if isinstance(error, StepTerminatedError) and cancelled.is_set():
                    return []
                self._sequence_in_cache = None  # what the cache holds is uncertain
                raise

    def _advance(self, sequence: TokenSequence) -> list[GenerationChunk]:
        session = self._session
        if self._sequence_in_cache is not sequence:
            self._reuse_prefix(sequence)
        elif session.length > sequence.computed:  # rejected draft tokens
            session.rewind(sequence.computed)
        # With states, accepted tokens before a rejected one are computed again. No further draft tokens then: each
        # rejection would return to the same states, and ever more tokens would have to be repeated.
        repeated = sequence.tokens[session.length : sequence.computed]
        tokens = sequence.pending(PREFILL_CHUNK, draft=not repeated)
        logits = session.step([*repeated, *tokens], 1 if sequence.prefilling else len(tokens))
        chunks = list(sequence.advance(logits))
        if sequence.keeps_states:
            session.keep_states()
        return chunks

    def _reuse_prefix(self, sequence: TokenSequence) -> None:
        """Keep the tokens in the cache that a new sequence begins with."""
        previous, session = self._sequence_in_cache, self._session
        cached = previous.tokens[: min(session.length, previous.computed)] if previous is not None else []
        shared = common_prefix(cached, sequence.tokens)
        kept = sequence.reuse(session.rewind(sequence.reusable(shared)))
        if shared >= kept + WORTH_KEEPING:
            sequence.keep_states_at(shared)
        self._sequence_in_cache = sequence


def _never() -> bool:
    return False

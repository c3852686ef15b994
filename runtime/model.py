"""`Model`: a bundle that answers. Every front end iterates what this yields and computes nothing itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_edge.runtime.backend.session import PREFILL_CHUNK, AnySession, HiddenStates, Session, open_session, tries_cuda
from llm_edge.runtime.base_model import BaseModel
from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.embed import check_pooling, pooled
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.generation import Generation
from llm_edge.runtime.loading import open_bundle
from llm_edge.runtime.results import (
    FinishReason,
    GenerationChunk,  # Lane,
)
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.scheduling.prefixes import common_prefix
from llm_edge.runtime.scheduling.sequence import TokenSequence
from llm_edge.runtime.score import Score, scored
from llm_edge.runtime.speculative.draft_model import DraftModel, proposer_for
from llm_edge.runtime.text.tokenizer import Tokenizer


class Model(BaseModel[Generation]):
    """A model for one conversation at a time.

    Beginning a generation, from whatever thread, ends an unfinished one before it. What both prompts begin with is not
    computed again.

    Attributes:
        guess: draft tokens may be verified, several in one step (`runtime/speculative/`); may be set.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: AnySession,
        tokenizer: Tokenizer,
        precision: PrecisionInfo,
        draft: DraftModel | None = None,
    ) -> None:
        super().__init__(bundle, tokenizer, precision, session.limit)
        self.guess = True
        self._session = session
        self._draft = draft
        self._lane: TokenSequence | None = None  # whose tokens the cache holds
        self._running = threading.Event()
        self._beginning = threading.Lock()
        self._stepping = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        precision: str | None = None,
        provider: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = True,
        draft: str | Path | None = None,
        draft_precision: str | None = None,
    ) -> Model:
        """Load a bundle.

        Args:
            path: the folder.
            precision: one that the bundle holds; None takes int8 where there is one, and on CUDA fp16.
            provider: `auto`, `cpu` or `cuda`; `auto` is CUDA where it works and has kernels for the graph's products.
            threads: of onnxruntime inside an operator; None leaves it the physical cores. TorchScript: of torch, for
                the whole process.
            verify: compare the checksums of all that is loaded. TorchScript is a program, and loaded verified only.
            draft: folder of a smaller bundle of the same vocabulary, which guesses tokens; see `DraftModel`.
            draft_precision: of that bundle; None as above.

        Raises:
            BundleError: a folder is missing, damaged or changed.
            ParameterError: a TorchScript bundle that shall not be verified, or a draft that cannot guess for this one.
            InputError: a TorchScript bundle where torch is missing.
            ProviderError: CUDA was asked for and is not there.
        """
        half = precision is None and tries_cuda(provider)
        bundle, info, tokenizer = open_bundle(path, precision, verify=verify, half=half)
        guesser = DraftModel.load(draft, draft_precision, bundle, info, tokenizer, provider, threads, verify=verify)
        session = open_session(
            bundle.file(info.model),
            bundle.shape,
            info.format,
            info.share_buffer,
            provider,
            threads,
            in_turns=guesser is not None,
            hidden_size=info.hidden_size,
        )
        if info.name == "fp16" and half and session.provider == "cpu":  # CUDA did not take it, and it is slow here
            return cls.load(path, None, "cpu", threads, verify=verify, draft=draft, draft_precision=draft_precision)
        return cls(bundle, session, tokenizer, info, guesser)

    @property
    def provider(self) -> str:
        """Where the model runs: `cpu` or `cuda`."""
        return self._session.provider

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime (or torch) since the model was loaded."""
        return self._session.run_seconds + (self._draft.run_seconds if self._draft is not None else 0.0)

    def forget(self) -> None:
        """Let go what earlier prompts computed; ends an unfinished generation."""
        self._replace(threading.Event())
        with self._stepping:
            self._lane = None
            if self._draft is not None:
                self._draft.forget()

    def score(self, text: str | Sequence[int]) -> Score:
        """Log-probabilities that the model gives a text's tokens; ends an unfinished generation.

        Raises:
            ParameterError: it has fewer than two tokens, or ids outside of the vocabulary.
            ContextLengthError: it does not fit.
        """
        tokens = self._text.encode_prompt(text)
        self._text.check(tokens, self.context_length + 1)
        self.forget()
        with self._stepping:
            self._session.rewind(0)
            return scored(tokens, lambda part: self._session.step(part, num_logits=0))

    def embed(self, text: str | Sequence[int], pooling: str = "mean", *, normalize: bool = False) -> HiddenStates:
        """A text as a vector, from its tokens' hidden states behind the last norm; ends an unfinished generation.

        Args:
            text: plain text, or token ids.
            pooling: `mean` of all tokens, the `last` one's, or `none`.
            normalize: divide by the Euclidean length.

        Returns:
            float32 [H]; [tokens, H] without pooling.

        Raises:
            ParameterError: a pooling that is none; the text is empty, or holds ids outside of the vocabulary.
            ContextLengthError: it does not fit.
            BundleError: this precision was exported without hidden states.
        """
        check_pooling(pooling)
        session = self._session
        if self.precision.hidden_size is None or not isinstance(session, Session):
            raise BundleError(
                f"{self.bundle.path}: {self.precision.name} offers no hidden states: "
                "export it again, as ONNX, with llm-export --hidden-states"
            )
        tokens = self._text.encode_prompt(text)
        self._text.check(tokens, self.context_length + 1)
        self.forget()
        with self._stepping:
            session.rewind(0)
            return pooled(tokens, session.hidden_states, pooling, normalize=normalize)

    def _begin(self, tokens: list[int], params: SamplingParams | None, began: float) -> Generation:
        self._text.check(tokens, self.context_length)
        params = params if params is not None else self.default_params
        guesses = proposer_for(self._draft) if self.guess and self._session.rewinds else None
        lane = self._text.lane(tokens, params, self.context_length, began, guesses)
        cancelled = threading.Event()
        self._replace(cancelled)
        return Generation(self._pieces(lane, cancelled), cancelled, lane.adjust)

    def _replace(self, cancelled: threading.Event) -> None:
        """End the generation that runs now; `cancelled` will end the next one."""
        with self._beginning:
            self._running.set()
            self._running = cancelled

    def _pieces(self, lane: TokenSequence, cancelled: threading.Event) -> Iterator[GenerationChunk]:
        while not cancelled.is_set():
            for piece in self._step(lane, cancelled):
                if cancelled.is_set():
                    break
                yield piece
                if piece.finish_reason is not None:
                    return
        yield lane.end(FinishReason.CANCELLED)

    def _step(self, lane: TokenSequence, cancelled: threading.Event) -> list[GenerationChunk]:
        """One step, the only one at a time; nothing once it is cancelled."""
        with self._stepping:
            if cancelled.is_set():
                return []
            session, before = self._session, self._lane
            if before is not lane:
                held = before.tokens[: session.length] if before is not None else []
                session.rewind(lane.reuse(common_prefix(held, lane.tokens)))
                self._lane = lane
            elif session.length > lane.computed:  # wrong guesses
                session.rewind(lane.computed)
            asked = lane.pending(PREFILL_CHUNK)
            return list(lane.take(session.step(asked, 1 if lane.prefilling else len(asked))))

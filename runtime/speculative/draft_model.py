"""Guesses at the next tokens by a smaller model of the same vocabulary. Knows no text and no sampling.

After Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with guesses that take the
draft's most likely token always: one counts where the model itself draws it, so no text changes. How many tokens are
guessed follows from the sizes of both models and from which guesses were right, never from time or load.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_edge.runtime.backend.session import PREFILL_CHUNK, Session, tries_cuda
from llm_edge.runtime.bundle import ONNX, Bundle, PrecisionInfo
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.loading import open_bundle
from llm_edge.runtime.scheduling.prefixes import common_prefix
from llm_edge.runtime.scheduling.sequence import CHUNK_ALIGNMENT
from llm_edge.runtime.speculative.prompt_lookup import MOST, DraftProposer, PromptLookup
from llm_edge.runtime.text.tokenizer import Tokenizer

_LAYER = 6 << 20  # what a layer takes beside reading its weights, as bytes of them
_VERIFIED = 0.07  # of a step, for each token more that it computes
_WORTH = 16  # tokens that may be computed afresh for each that may come
_MEMORY = 32.0  # guessed tokens that the share of right ones is taken of, at most
_REST = 16  # tokens drawn without guesses where they did not pay; twice as many each time


class DraftModel:
    """A smaller model that guesses for another one, one answer at a time.

    Args:
        session: the smaller model's.
        vocabulary: ids it may guess.
        price: of guessing and verifying a token, as a share of a step of the model it guesses for.
    """

    def __init__(self, session: Session, vocabulary: int, price: float) -> None:
        self.price = price
        self._session = session
        self._vocabulary = vocabulary
        self._held: list[int] = []  # tokens in its cache

    @classmethod
    def load(
        cls,
        path: str | Path | None,
        precision: str | None,
        bundle: Bundle,
        info: PrecisionInfo,
        tokenizer: Tokenizer,
        provider: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = True,
    ) -> DraftModel | None:
        """Load a bundle that guesses for `bundle` in the precision `info`; None for no path.

        The other arguments are those of `Model.load`.

        Raises:
            BundleError: the folder is missing, damaged or changed.
            ParameterError: it cannot guess for this bundle, or there is a precision and no path.
            ProviderError: CUDA was asked for and is not there.
        """
        if path is None:
            if precision is not None:
                raise ParameterError(f"draft_precision is {precision!r}, and there is no draft: name its bundle")
            return None
        half = precision is None and tries_cuda(provider)
        own, its, other = open_bundle(path, precision, verify=verify, half=half)
        for each, graph in ((bundle, info), (own, its)):
            if graph.format != ONNX or not graph.share_buffer:
                raise ParameterError(
                    f"draft: {each.path} in {graph.name} cannot take guesses back: export it with --graph fused"
                )
        for number in range(max(bundle.shape.vocab_size, own.shape.vocab_size)):
            if other.token_text(number) != tokenizer.token_text(number):
                raise ParameterError(
                    f"draft: {own.path} has another vocabulary than {bundle.path} (token {number} is "
                    f"{other.token_text(number)!r}, not {tokenizer.token_text(number)!r}): take a model of its family"
                )
        graph_file, width = own.file(its.model), its.hidden_size
        session = Session(graph_file, own.shape, True, provider, threads, in_turns=True, hidden_size=width)
        price = _cost(own, its) / _cost(bundle, info) + _VERIFIED
        return cls(session, min(bundle.shape.vocab_size, own.shape.vocab_size), price)

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime so far."""
        return self._session.run_seconds

    def forget(self) -> None:
        """Let go what earlier texts computed."""
        self._rewind(0)

    def begin(self, tokens: Sequence[int]) -> None:
        """Take a text over from the one before; as with prompts, cuts lie at multiples of `CHUNK_ALIGNMENT` only."""
        self._rewind(
            max(min(common_prefix(self._held, tokens), len(tokens) - 2) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT, 0)
        )

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most likely tokens behind `tokens`, one after another; fewer where its context ends.

        Where many tokens are new to it, it computes some and guesses nothing: a call takes no longer than a step does.
        """
        count = min(count, self._session.limit - len(tokens) + 1)
        if count < 1:
            return []
        self._rewind(min(common_prefix(self._held, tokens), len(tokens) - 1))
        asked = tokens[len(self._held) :]
        if len(asked) > PREFILL_CHUNK + 1:  # a single last token would take another way through the kernels
            self._step(asked[:PREFILL_CHUNK])
            return []
        guess = [self._step(asked)]
        while len(guess) < count:
            guess.append(self._step(guess[-1:]))
        return guess

    def missing(self, tokens: list[int]) -> int:
        """How many tokens of a text it would have to compute."""
        return len(tokens) - common_prefix(self._held, tokens)

    def _step(self, tokens: list[int]) -> int:
        """The most likely token behind those held and these, which are held then."""
        known = self._session.shape.vocab_size  # something else stands for ids that it does not have
        logits = self._session.step([token if token < known else 0 for token in tokens])
        self._held += tokens
        return int(logits[-1, : self._vocabulary].argmax())

    def _rewind(self, length: int) -> None:
        if length < len(self._held):
            self._session.rewind(length)
            del self._held[length:]


class DraftGuesses:
    """The guesses of one answer: what the text itself suggests (`PromptLookup`), else what a draft does.

    A draft's guesses are as long as pays best for the share of right ones of late; where none pays, they rest, for
    longer each time.
    """

    def __init__(self, draft: DraftModel) -> None:
        self._lookup = PromptLookup()
        self._draft = draft
        self._begun = False
        self._drafted = False  # the last guess is the draft's
        self._right, self._wrong = 3.0, 1.0
        self._rest = _REST
        self._until = 0  # tokens in the text before the next guess

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What may follow `tokens`, at most so many; none for nothing. `tokens` only grows from call to call."""
        found = self._lookup.guess(tokens, most)
        if found or len(tokens) < self._until:
            return found
        count = best_length(self._right / (self._right + self._wrong), self._draft.price, min(most, MOST))
        if not count or self._draft.missing(tokens) > _WORTH * most:
            return []
        if not self._begun:
            self._begun = True
            self._draft.begin(tokens)
        found = self._draft.guess(tokens, count)
        self._drafted = bool(found)
        return found

    def tell(self, length: int, right: int, drawn: int) -> None:
        """Of a guess of `length` tokens the first `right` ones came; `drawn` tokens stand in the text now."""
        drafted, self._drafted = self._drafted, False
        if not drafted:
            self._lookup.tell(length, right, drawn)
            return
        self._right += right
        self._wrong += right < length
        known = self._right + self._wrong
        if known > _MEMORY:
            self._right, self._wrong = self._right * _MEMORY / known, self._wrong * _MEMORY / known
        price = self._draft.price
        if self._right <= price * (self._right + self._wrong):
            self._until, self._rest = drawn + self._rest, 2 * self._rest
            self._right, self._wrong = price + 0.05, 1 - price  # the next guess is a try: one wrong token is enough


def proposer_for(draft: DraftModel | None) -> DraftProposer:
    """Those of a new answer."""
    return DraftGuesses(draft) if draft is not None else PromptLookup()


def best_length(chance: float, price: float, most: int) -> int:
    """How many tokens to guess, 0 to `most`, for the most tokens a unit of time.

    Args:
        chance: that a guessed token is right, if all before it are.
        price: of a guessed token, as a share of a step.
    """
    best, length, tokens, reached = 1.0, 0, 1.0, 1.0
    for count in range(1, most + 1):
        reached *= chance
        tokens += reached
        if tokens / (1 + count * price) > best:
            best, length = tokens / (1 + count * price), count
    return length


def _cost(bundle: Bundle, info: PrecisionInfo) -> int:
    """What a step over one token takes, as bytes: weights are read once, and each layer costs something beside that."""
    return info.size + _LAYER * bundle.shape.num_hidden_layers

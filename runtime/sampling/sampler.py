"""`Sampler`: draws the next token from the logits [V] of the latest one.

Sampling applies the pure functions of `transforms.py` in the order of `SamplingParams`: processors, then what changes
logits [V], then the filters, then `draw`. Each filter shrinks the row to what it keeps, so later ones see few numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from llm_edge.runtime.errors import LogitsError, ParameterError
from llm_edge.runtime.sampling import transforms
from llm_edge.runtime.sampling.history import Counts, Ngrams, Repetitions
from llm_edge.runtime.sampling.parameter_spec import refused
from llm_edge.runtime.sampling.params import GREEDY_BELOW, PARAMETERS, SamplingParams
from llm_edge.runtime.sampling.transforms import Ids, Row


class LogitsProcessor(Protocol):
    """Changes logits before any other transform, depending on the tokens so far.

    A processor belongs to one answer and may cache what it derived from the tokens, which are only ever appended to.
    """

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """Return logits [V], `row` itself or a new array, with -inf for tokens that must not be drawn.

        Args:
            row: logits [V]; not to be modified.
            tokens: the prompt and the tokens drawn so far; not to be modified.
        """


class Sampler:
    """Draws the tokens of one answer, one after another.

    A processor that would leave no token is ignored for that token, and so is `no_repeat_ngram` where it would ban all
    that a processor such as a constraint allows. Only `sample` changes the state, and only by the token it draws, so
    draft tokens are verified by sampling row after row while they match.

    Args:
        params: sampling parameters.
        prompt_tokens: token ids before the answer.
        processors: see `LogitsProcessor`.
        end_tokens: ids that end the text, for `min_tokens`.
        dry_breakers: ids of the tokens whose text contains one of `params.dry_breakers`.
        generated: tokens of the answer that another sampler drew.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
        *,
        end_tokens: Collection[int] = frozenset(),
        dry_breakers: Collection[int] = frozenset(),
        generated: Iterable[int] = (),
    ) -> None:
        self.params = params
        self._processors = tuple(processors)
        self._tokens = [int(token) for token in prompt_tokens]
        if self._tokens and min(self._tokens) < 0:
            raise refused("prompt_tokens", min(self._tokens), "token ids of 0 or more")
        self._prompt_length = len(self._tokens)
        self._end_tokens = _ids(end_tokens)
        self._banned = _ids(params.banned_tokens)
        self._banned_first = _ids(params.banned_first_tokens)
        biases = [pair for pair in params.logit_bias if pair[0] <= _LARGEST_ID]
        self._biased = _ids(token for token, _ in biases)
        self._biases = np.array([bias for _, bias in biases], np.float32)
        self._generated = Counts()
        self._repeats = params.repetition_penalty != 1 and params.repetition_window != 0
        self._seen = Counts(self._tokens) if self._repeats and params.repetition_window < 0 else None
        self._ngrams = Ngrams(self._tokens, params.no_repeat_ngram) if params.no_repeat_ngram else None
        self._repetitions: Repetitions | None = None
        if params.dry_multiplier and params.dry_range:
            self._repetitions = Repetitions(self._tokens, dry_breakers, params.dry_range)
        histories = (self._generated, self._seen, self._ngrams, self._repetitions)
        self._histories = [history for history in histories if history is not None]
        self._filters = _filters(params)
        self._mirostat_mu = 2 * params.mirostat_tau  # bits
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        # XTC has a separate generator, so that it changes no draw where it excludes nothing.
        self._xtc_random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(params.seed, spawn_key=(1,))))
        self._xtc_uniform = self._xtc_random.random()  # for the next token
        for token in generated:
            self._add(token)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt's tokens and the generated ones, oldest first."""
        return tuple(self._tokens)

    @property
    def generated(self) -> tuple[int, ...]:
        """The generated tokens, oldest first."""
        return tuple(self._tokens[self._prompt_length :])

    def sample(self, logits: Row) -> int:
        """Draw the next token from logits [V] and append it.

        Raises:
            LogitsError: the largest logit is not a finite number.
            ParameterError: `logits` is not a non-empty vector, or the parameters ban every token.
        """
        ids, row = self.candidates(logits)
        uniform = self._random.random()  # always one per token, so that the random stream stays aligned
        position = transforms.draw(row, uniform) if row.size > 1 else 0
        token = position if ids is None else int(ids[position])
        if self.params.mirostat_tau:
            error = transforms.surprise(row, position) - self.params.mirostat_tau
            self._mirostat_mu -= self.params.mirostat_eta * error
        self._xtc_uniform = self._xtc_random.random()  # one per token
        self._add(token)
        return token

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        for history in self._histories:
            history.add(token)

    def candidates(self, logits: Row) -> tuple[Ids | None, Row]:
        """The token ids that the next draw chooses from, ascending (None = all V), and their transformed logits."""
        if logits.ndim != 1 or logits.size == 0:
            raise refused("logits", logits.shape, "one row of logits, of shape [V]")
        given = row = logits.astype(np.float32, copy=False)
        forced = False
        for process in self._processors:
            processed = _unless_all_masked(row, process(row, self._tokens))
            forced |= processed is not row and getattr(process, "overrides_bans", False)
            row = processed
        with np.errstate(all="ignore"):  # overflows are caught by the check below
            row = self._transform(row, restricted=row is not given, forced=forced)
            best = int(row.argmax())  # NaN counts as the largest, so checking this position is enough
            if not np.isfinite(row[best]):
                raise LogitsError(
                    f"logits: the largest of {row.size} is {row[best]}, so no token can be drawn: "
                    "the bundle's weights or their number type are at fault, export it again in a wider one"
                )
            if self.params.temperature < GREEDY_BELOW:
                return np.array([best]), row[best : best + 1]
            return self._filter(row)

    def _transform(self, row: Row, *, restricted: bool, forced: bool) -> Row:
        """Apply biases, bans, penalties and temperature to logits [V].

        `restricted`: a processor changed them; `forced`: one that overrides bans did.
        """
        params = self.params
        if self._biased.size:
            row = transforms.add(row, self._biased, self._biases)
        row = row if forced else self._mask_banned(row)
        if self._ngrams is not None:
            row = self._mask_repeating(row, restricted)
        if self._repeats:
            row = transforms.repetition_penalty(row, self._window(), params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            penalties = params.presence_penalty, params.frequency_penalty
            row = transforms.presence_frequency(row, *self._generated.arrays(), *penalties)
        if self._repetitions is not None:
            allowed = params.dry_allowed_length
            ids, lengths = self._repetitions.following(allowed)
            row = transforms.dry(row, ids, lengths, params.dry_multiplier, params.dry_base, allowed)
        if params.temperature >= GREEDY_BELOW and params.temperature != 1:
            row = transforms.temperature(row, params.temperature)
        return row

    def _mask_banned(self, row: Row) -> Row:
        """Mask what parameters ban at this position; raises ParameterError if nothing is left."""
        generated = len(self._tokens) - self._prompt_length
        bans = [("banned_tokens", self._banned)]
        if generated == 0:
            bans.append(("banned_first_tokens", self._banned_first))
        if generated < self.params.min_tokens:
            bans.append(("min_tokens", self._end_tokens))
        masked = row
        for _, ids in bans:
            masked = transforms.mask_tokens(masked, ids)
        if _all_masked(row, masked):
            raise self._none_left(*(name for name, ids in bans if ids.size))
        return masked

    def _mask_repeating(self, row: Row, restricted: bool) -> Row:
        assert self._ngrams is not None
        masked = transforms.mask_tokens(row, self._ngrams.repeating())
        if not _all_masked(row, masked):
            return masked
        if restricted:  # a constraint forces these tokens, for example the punctuation of JSON
            return row
        raise self._none_left("no_repeat_ngram")

    def _none_left(self, *names: str) -> ParameterError:
        position = len(self._tokens) - self._prompt_length + 1
        return ParameterError(
            f"{', '.join(names)}: no token is left to draw as token {position} of the answer: ban fewer tokens"
        )

    def _filter(self, row: Row) -> tuple[Ids | None, Row]:
        filters = self._filters
        if self.params.mirostat_tau:
            filters = [(transforms.keep_mirostat, self._mirostat_mu)]
        elif self._xtc_uniform < self.params.xtc_probability:
            filters = [*filters, (transforms.keep_xtc, self.params.xtc_threshold)]
        ids: Ids | None = None
        for keep, value in filters:
            kept = keep(row, value)
            row = row[kept]
            ids = kept if ids is None else ids[kept]
        return ids, row

    def _window(self) -> Ids:
        if self._seen is not None:
            return self._seen.arrays()[0]
        return np.array(self._tokens[-self.params.repetition_window :], dtype=np.intp)


def _filters(params: SamplingParams) -> list[tuple[transforms.Filter, Any]]:
    """The filters whose parameters differ from the default, with their values."""
    values = {name: getattr(params, name) for name in PARAMETERS if name in transforms.FILTERS}
    return [(transforms.FILTERS[name], value) for name, value in values.items() if value != PARAMETERS[name].default]


_LARGEST_ID = 2**31 - 1  # no vocabulary has more, and arrays of ids hold it


def _ids(tokens: Iterable[int]) -> Ids:
    return np.array([token for token in tokens if token <= _LARGEST_ID], np.intp)


def _unless_all_masked(row: Row, processed: Row) -> Row:
    return row if _all_masked(row, processed) else processed


def _all_masked(row: Row, processed: Row) -> bool:
    """Whether processing masked every token that had a logit."""
    return processed is not row and bool(np.isneginf(processed.max())) and not np.isneginf(row.max())

"""What a caller may ask of the draws, checked; it knows neither how they are done nor anything of models."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint

# Below this a temperature is greedy: dividing float32 logits by less only makes infinities.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn, and when to stop; a value out of its range raises ParameterError.

    Listed in the order in which they act on the logits:

    max_newlines        newline characters, 0 = off, and so is None, which becomes 0. A token that would put more
                        than this many in a row, the prompt's too, cannot be drawn; tokens without text break a
                        row, and those that end the text can always be drawn.
    single_think_end    true or false. What ends the reasoning, a token or a text, cannot be completed once it stands
                        behind the last one that starts it; nothing happens for models that have neither.
    logit_bias          token id -> -100 to 100, as a mapping (its ids may be texts, as JSON's are) or as pairs,
                        kept as pairs in the order of ids. Added to the logit; -100 is nearly a ban, 100 nearly
                        forces. Ids the model has no logit for do nothing, here and in what follows.
    banned_tokens       token ids that cannot be drawn.
    min_tokens          tokens, 0 = off. Those that end the text cannot be drawn before so many others.
    no_repeat_ngram     2 to 64 tokens, or 1 = none twice, 0 = off. What would repeat so many tokens in a row, the
                        prompt's too, cannot be drawn (as transformers' no_repeat_ngram_size).
    repetition_penalty  0.01 to 100, 1 = off. Logits of the tokens in the window, each token once: a positive
                        logit is divided by it, a negative one multiplied.
    repetition_window   tokens; how many of the latest, the prompt's too, the repetition penalty looks at.
                        -1 = all, 0 = none.
    presence_penalty    -2 to 2, 0 = off. Subtracted once from the logit of every token generated so far.
    frequency_penalty   -2 to 2, 0 = off. Subtracted once for every time the token was generated.
    dry_multiplier      0 to 100, 0 = off. DRY, "don't repeat yourself": if the latest L tokens stand earlier in
                        the text too, multiplier * base ** (L - allowed length), 100 at most, is subtracted from
                        the logit of the token that came next there. The longest L of a token counts.
    dry_base            1 to 10; see above.
    dry_allowed_length  1 to 64 tokens. Shorter repetitions are free.
    dry_range           tokens; how many of the latest, the prompt's too, DRY looks at. -1 = all, 0 = none.
    dry_breakers        strings. A token with one of them in its text ends what counts as a repetition, and is
                        never pushed down itself.
    temperature         0 to 100. Logits are divided by it. 0 (or below 1e-5) = greedy: the largest logit
                        after the penalties, the lowest id among equals; all below is skipped then.
    mirostat_tau        0 to 100 bits, 0 = off. Mirostat 2 takes the place of all the filters below: it keeps the
                        tokens up to a surprise (-log2 of the probability) that it moves after every token, so
                        that the surprise is mirostat_tau on average. 5 is usual. At least one is kept.
    mirostat_eta        0 to 1. How far it moves: this times what the last surprise was off by.
    top_n_sigma         0 to 100, 0 = off. Keeps logits at most so many standard deviations of all logits below
                        the largest; logits of -inf do not count. Temperature does not change what it keeps.
    top_k               tokens, 0 = off. Keeps the k largest logits, and every logit equal to the k-th.
    top_p               0 to 1, 1 = off. Keeps the fewest most probable tokens that together reach this
                        probability; at least one; among equals the highest ids.
    min_p               0 to 1, 0 = off. Keeps tokens at least min_p times as probable as the most probable.
    typical_p           0 to 1, 1 = off. Keeps the fewest tokens, those of a surprise nearest to the mean one
                        (the entropy) first, that together reach this probability, and all as near as the last
                        of them. The most probable token may go.
    xtc_probability     0 to 1, 0 = off. "Exclude top choices": how often, of all tokens drawn, all tokens at
                        least xtc_threshold probable are left out except the least probable of them.
    xtc_threshold       0 to 1; above 0.5 there are no two such tokens, and nothing happens.
    seed                0 to 2**64 - 1, or None = different every time. A seed and a machine give one text.

    The first two are `LogitsProcessor`s (as are constraint and reasoning_budget), which whoever drives the sampler
    gives to it, together with the ids of the tokens that end the text and of those that dry_breakers name. It does not
    act on the rest either:

    max_tokens          tokens, 1 or more, those of the reasoning included.
    stop                strings that end the answer; one string may stand alone. What they spell in a reasoning
                        does not end it.
    stop_token_ids      token ids that end the text, the reasoning too.
    constraint          a `Constraint` that the answer keeps to: JSON, a schema, an expression, a grammar, a choice;
                        the reasoning does not. None = off.
    reasoning_budget    tokens of a reasoning at most, 0 or more; then only the tokens that end it can be drawn, one
                        after another. None = off.
    logprobs            0 to 20, or None = off. Reports the log-probability of every token drawn, and so many of
                        the most probable ones, in the model's own distribution: before any of the above.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_newlines: int | None = 0
    single_think_end: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    no_repeat_ngram: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logprobs: int | None = None
    constraint: Constraint | None = None
    reasoning_budget: int | None = None

    def __post_init__(self) -> None:
        self._within("temperature", 0.0, 100.0)
        self._within("top_p", 0.0, 1.0)
        self._within("min_p", 0.0, 1.0)
        self._within("repetition_penalty", 0.01, 100.0)
        self._within("presence_penalty", -2.0, 2.0)
        self._within("frequency_penalty", -2.0, 2.0)
        self._within("dry_multiplier", 0.0, 100.0)
        self._within("dry_base", 1.0, 10.0)
        self._within("mirostat_tau", 0.0, 100.0)
        self._within("mirostat_eta", 0.0, 1.0)
        self._within("top_n_sigma", 0.0, 100.0)
        self._within("typical_p", 0.0, 1.0)
        self._within("xtc_probability", 0.0, 1.0)
        self._within("xtc_threshold", 0.0, 1.0)
        self._within("top_k", 0, 2**31 - 1)
        self._within("repetition_window", -1, 2**31 - 1)
        self._within("max_tokens", 1, 2**31 - 1)
        self._within("min_tokens", 0, 2**31 - 1)
        self._within("no_repeat_ngram", 0, 64)
        self._within("dry_allowed_length", 1, 64)
        self._within("dry_range", -1, 2**31 - 1)
        if self.max_newlines is None:
            object.__setattr__(self, "max_newlines", 0)
        self._within("max_newlines", 0, 2**31 - 1)
        if not isinstance(self.single_think_end, bool):
            raise refused("single_think_end", self.single_think_end, "true or false")
        if self.seed is not None:
            self._within("seed", 0, 2**64 - 1)
        if self.logprobs is not None:
            self._within("logprobs", 0, 20)
        if self.reasoning_budget is not None:
            self._within("reasoning_budget", 0, 2**31 - 1)
        if not isinstance(self.constraint, Constraint | None):
            raise refused("constraint", self.constraint, "a Constraint")
        self._strings("stop")
        self._strings("dry_breakers")
        self._items("stop_token_ids", "integers of 0 or more", _is_token)
        self._items("banned_tokens", "integers of 0 or more", _is_token)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def _within(self, name: str, low: float, high: float) -> None:
        value, whole = getattr(self, name), isinstance(low, int)
        right = _is_integer(value) or (isinstance(value, float) and not whole)
        if not right or not low <= value <= high:  # NaN compares false; an int beyond any float compares too
            raise refused(name, value, f"{'an integer' if whole else 'a number'} from {low} to {high}")
        object.__setattr__(self, name, value if whole else float(value))

    def _strings(self, name: str) -> None:
        if isinstance(getattr(self, name), str):
            object.__setattr__(self, name, (getattr(self, name),))
        self._items(name, "strings, none of them empty", lambda item: isinstance(item, str) and item != "")

    def _items(self, name: str, wanted: str, allowed: Callable[[object], bool]) -> None:
        value = getattr(self, name)
        if not isinstance(value, list | tuple) or not all(map(allowed, value)):
            raise refused(name, value, f"a list of {wanted}")
        object.__setattr__(self, name, tuple(value))


def refused(name: str, value: object, wanted: str) -> ParameterError:
    """The error for a value that a parameter cannot have."""
    return ParameterError(f"{name}: {reprlib.repr(value)} is not allowed, give {wanted}")


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their ids; of pairs with one id the last counts."""
    wanted = "a mapping of token ids of 0 or more to numbers from -100.0 to 100.0"
    pairs = value.items() if isinstance(value, Mapping) else value
    biases: dict[int, float] = {}
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes):
        raise refused("logit_bias", value, wanted)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise refused("logit_bias", value, wanted)
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
            token = int(token)
        if not _is_token(token) or not (_is_integer(bias) or isinstance(bias, float)) or not -100 <= bias <= 100:
            raise refused("logit_bias", pair, wanted)
        biases[token] = float(bias)
    return tuple(sorted(biases.items()))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: object) -> TypeGuard[int]:
    return _is_integer(value) and value >= 0

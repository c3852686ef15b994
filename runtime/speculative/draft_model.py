"""`DraftModel`: a smaller model with the same vocabulary that proposes draft tokens.

After Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with greedy draft tokens: a
draft token is accepted if the main model samples it too, so texts do not change. How many tokens are proposed depends
on the sizes of both models and on earlier acceptances, never on time or load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import ONNX, Bundle, PrecisionInfo
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.loading import LoadedBundle, load
from llm_edge.runtime.scheduling.prefixes import aligned_prefix, common_prefix
from llm_edge.runtime.speculative.prompt_lookup import MAX_DRAFT_TOKENS, DraftProposer, PromptLookup

_LAYER_BYTES = 6 << 20  # cost of a layer besides reading its weights, in bytes read
_VERIFY_COST = 0.07  # cost of each further token in a step, relative to the step
_MAX_CATCH_UP = 16  # tokens the draft model may have to compute per token it can propose
_MEMORY = 32.0  # number of draft tokens that the acceptance rate is averaged over
_INITIAL_PAUSE = 16  # tokens without proposals after they did not pay off; doubles each time


class DraftModel:
    """A smaller model that drafts for another one, for one generation at a time.

    It proposes the first `vocabulary` token ids. Proposing and verifying a token costs `cost_ratio` steps of the main
    model.
    """

    def __init__(self, session: Session, vocabulary: int, cost_ratio: float) -> None:
        self.cost_ratio = cost_ratio
        self._session = session
        self._vocabulary = vocabulary
        self._cached: list[int] = []  # tokens in its KV cache

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime so far."""
        return self._session.run_seconds

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Terminate steps that are no longer wanted; see `Session.cancel_steps_if`."""
        self._session.cancel_steps_if(unwanted)

    def clear_cache(self) -> None:
        """Drop what earlier texts computed."""
        self._rewind(0)

    def start(self, tokens: Sequence[int]) -> None:
        """Begin another text; like prompts, it is split at multiples of `CHUNK_ALIGNMENT` only."""
        self._rewind(aligned_prefix(common_prefix(self._cached, tokens), len(tokens)))

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after `tokens`, one after another; fewer where the context ends.

        If many of `tokens` are new to it, it computes some and proposes nothing, so that a call never takes longer
        than a step of a prompt.
        """
        count = min(count, self._session.limit - len(tokens) + 1)
        if count < 1:
            return []
        self._rewind(min(common_prefix(self._cached, tokens), len(tokens) - 1))
        new = tokens[len(self._cached) :]
        if len(new) > PREFILL_CHUNK + 1:  # a step over a single last token would use other kernels
            self._step(new[:PREFILL_CHUNK])
            return []
        draft = [self._step(new)]
        while len(draft) < count:
            draft.append(self._step(draft[-1:]))
        return draft

    def missing(self, tokens: list[int]) -> int:
        """How many of `tokens` it would have to compute."""
        return len(tokens) - common_prefix(self._cached, tokens)

    def _step(self, tokens: list[int]) -> int:
        """Add tokens to the cache; returns the most likely next one."""
        if self._session.length != len(self._cached):  # an interrupt came between the two statements below
            self._session.rewind(len(self._cached))
            repeated = self._cached[self._session.length :]  # their window may be freed
            for start in range(0, len(repeated), PREFILL_CHUNK):
                self._session.step(self._known(repeated[start : start + PREFILL_CHUNK]))
        logits = self._session.step(self._known(tokens))
        self._cached += tokens
        return int(logits[-1, : self._vocabulary].argmax())

    def _known(self, tokens: list[int]) -> list[int]:
        """Replace ids that the model does not have."""
        return [token if token < self._session.shape.vocab_size else 0 for token in tokens]

    def _rewind(self, length: int) -> None:
        if length < len(self._cached):
            del self._cached[self._session.rewind(length) :]


class DraftModelProposer:
    """Draft tokens for one generation: from prompt lookup, else from a draft model.

    The number of draft tokens maximizes throughput at the recent acceptance rate; if none pays off, proposing pauses,
    longer each time.
    """

    def __init__(self, model: DraftModel) -> None:
        self._lookup = PromptLookup()
        self._model = model
        self._started = False
        self._from_model = False  # the last proposal came from the draft model
        self._accepted, self._rejected = 3.0, 1.0
        self._pause = _INITIAL_PAUSE
        self._paused_until = 0  # tokens in the text before the next proposal

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """See `DraftProposer`."""
        draft = self._lookup.propose(tokens, limit)
        if draft or len(tokens) < self._paused_until:
            return draft
        rate = self._accepted / (self._accepted + self._rejected)
        count = optimal_draft_length(rate, self._model.cost_ratio, min(limit, MAX_DRAFT_TOKENS))
        if not count or self._model.missing(tokens) > _MAX_CATCH_UP * limit:
            return []
        if not self._started:
            self._started = True
            self._model.start(tokens)
        draft = self._model.propose(tokens, count)
        self._from_model = bool(draft)
        return draft

    def record_acceptance(self, proposed: int, accepted: int, total: int) -> None:
        """See `DraftProposer`."""
        from_model, self._from_model = self._from_model, False
        if not from_model:
            self._lookup.record_acceptance(proposed, accepted, total)
            return
        self._accepted += accepted
        self._rejected += accepted < proposed
        known = self._accepted + self._rejected
        if known > _MEMORY:
            self._accepted, self._rejected = self._accepted * _MEMORY / known, self._rejected * _MEMORY / known
        cost = self._model.cost_ratio
        if self._accepted <= cost * (self._accepted + self._rejected):
            self._paused_until, self._pause = total + self._pause, 2 * self._pause
            # The next proposal is a trial: one rejection ends it.
            self._accepted, self._rejected = cost + 0.05, 1 - cost


def load_draft_model(options: LoadOptions, target: LoadedBundle) -> DraftModel | None:
    """Load the draft model that the options name, to draft for `target`; None if they name none.

    Raises:
        ParameterError: it cannot draft for this bundle, or `draft_precision` is given without `draft`.
        BundleError, InputError, ProviderError: as in `load`.
    """
    if options.draft is None:
        if options.draft_precision is not None:
            raise ParameterError(f"draft_precision is {options.draft_precision!r} without draft: name a bundle")
        return None
    draft = load(options.draft, options.draft_options, interleaved=True)
    for each in (target, draft):
        if each.precision.format != ONNX or not each.precision.share_buffer:
            raise ParameterError(
                f"draft: {each.bundle.path} in {each.precision.name} cannot rewind its cache: "
                "export it with --graph fused"
            )
    bundle, own = target.bundle, draft.bundle
    if own.shape.has_states:
        raise ParameterError(
            f"draft: {own.path} keeps states, which cannot be rewound token by token: use another model"
        )
    for token in range(max(bundle.shape.vocab_size, own.shape.vocab_size)):
        found, expected = draft.tokenizer.token_text(token), target.tokenizer.token_text(token)
        if found != expected:
            raise ParameterError(
                f"draft: {own.path} has another vocabulary than {bundle.path} "
                f"(token {token} is {found!r}, not {expected!r}): use a model of the same family"
            )
    assert isinstance(draft.session, Session)
    ratio = _step_cost(own, draft.precision) / _step_cost(bundle, target.precision) + _VERIFY_COST
    return DraftModel(draft.session, min(bundle.shape.vocab_size, own.shape.vocab_size), ratio)


def proposer_for(model: DraftModel | None) -> DraftProposer:
    """The proposer of a new generation."""
    return DraftModelProposer(model) if model is not None else PromptLookup()


def optimal_draft_length(acceptance_rate: float, cost_ratio: float, limit: int) -> int:
    """The number of draft tokens, 0 to `limit`, that gives the most tokens per unit of time.

    A draft token costs `cost_ratio` steps and is accepted with the probability `acceptance_rate` if all before it are.
    """
    best, length, tokens, reached = 1.0, 0, 1.0, 1.0
    for count in range(1, limit + 1):
        reached *= acceptance_rate
        tokens += reached
        if tokens / (1 + count * cost_ratio) > best:
            best, length = tokens / (1 + count * cost_ratio), count
    return length


def _step_cost(bundle: Bundle, precision: PrecisionInfo) -> int:
    """Cost of a step over one token in bytes read: the weights once, and a constant per layer."""
    return precision.size + _LAYER_BYTES * bundle.shape.num_hidden_layers

"""`SamplingParams`: how the tokens of an answer are drawn and when it ends.

This class is the one table of sampling parameters. Validation, command-line options, the chat's panel, presets,
endpoint requests, checkpoint defaults and docs/sampling.md are derived from `PARAMETERS`, which is read off it. To add
a parameter, add a field here and, if it filters tokens, a function with `@filter_of` in `transforms.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import Api, ParameterSpec, Slider, parameter, specs_of

# Below this a temperature is greedy: dividing float32 logits by less only makes infinities.
GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are drawn and when it ends; docs/sampling.md describes each parameter.

    Fields are listed in the order in which they act on the logits [V] of a token.

    Raises:
        ParameterError: a value is of the wrong kind or out of range.
    """

    # fmt: off
    max_newlines: int = parameter(
        0, "Newlines", "allow at most this many newlines in a row; 0 = no limit", group="tokens",
        between=(0, _MAX_INT), slider=Slider(0, 20, 1),
        detail="Newlines at the end of the prompt count; tokens without text end a run, and end tokens stay "
        "allowed."
    )
    single_think_end: bool = parameter(
        False, "Single think end", "do not let reasoning end a second time", group="reasoning",
        detail="Bans the end of reasoning where it follows the last start of reasoning already. No effect on "
        "models without reasoning."
    )
    logit_bias: tuple[tuple[int, float], ...] = parameter(
        (), "Logit bias", "add -100 to 100 to the logits of these token ids", group="tokens",
        api=Api(openai="logit_bias", llamacpp="logit_bias"),
        detail="A mapping (JSON's string keys are accepted) or pairs; of pairs with the same id the last "
        "counts. -100 nearly bans a token, 100 nearly forces it. Ids outside the vocabulary are ignored."
    )
    banned_tokens: tuple[int, ...] = parameter(
        (), "Banned tokens", "never draw these token ids", group="tokens",
        api=Api(generation_config="suppress_tokens"),
        detail="Ids outside the vocabulary are ignored. An answer fails if no token is left."
    )
    banned_first_tokens: tuple[int, ...] = parameter(
        (), "Banned first tokens", "never begin an answer with these token ids", group="tokens",
        api=Api(generation_config="begin_suppress_tokens"),
        detail="Ids outside the vocabulary are ignored."
    )
    min_tokens: int = parameter(
        0, "Min tokens", "minimum answer length in tokens; 0 = none", group="limits", between=(0, _MAX_INT),
        slider=Slider(0, 4096, 16), api=Api(generation_config="min_new_tokens"),
        detail="End tokens are banned until then."
    )
    no_repeat_ngram: int = parameter(
        0, "No-repeat n-gram", "ban tokens that would repeat an n-gram of this size; 0 = off", group="penalties",
        between=(0, 64), slider=Slider(0, 20, 1), api=Api(generation_config="no_repeat_ngram_size"),
        detail="2 to 64 tokens; 1 allows no token twice. The prompt counts."
    )
    repetition_penalty: float = parameter(
        1.0, "Repetition penalty", "above 1 makes recent tokens less likely", group="penalties",
        between=(0.01, 100.0), order=5, slider=Slider(0.5, 2.0, 0.05),
        api=Api(llamacpp="repeat_penalty", generation_config="repetition_penalty"),
        detail="Positive logits of the tokens in the repetition window are divided by it, negative ones "
        "multiplied, each token once; 1 = off."
    )
    repetition_window: int = parameter(
        64, "Repetition window", "how many of the latest tokens the repetition penalty covers; -1 = all",
        group="penalties", between=(-1, _MAX_INT), slider=Slider(-1, 4096, 32),
        api=Api(llamacpp="repeat_last_n", generation_config="repetition_window"),
        detail="The prompt counts. 0 = none."
    )
    presence_penalty: float = parameter(
        0.0, "Presence penalty", "above 0 makes tokens the answer already used less likely", group="penalties",
        between=(-2.0, 2.0), order=6, slider=Slider(-2.0, 2.0, 0.1),
        api=Api(openai="presence_penalty", llamacpp="presence_penalty"),
        detail="Subtracted once from the logit of every token generated so far."
    )
    frequency_penalty: float = parameter(
        0.0, "Frequency penalty", "above 0 makes tokens less likely each time the answer uses them",
        group="penalties", between=(-2.0, 2.0), order=7, slider=Slider(-2.0, 2.0, 0.1),
        api=Api(openai="frequency_penalty", llamacpp="frequency_penalty"),
        detail="Subtracted once for every time a token was generated."
    )
    dry_multiplier: float = parameter(
        0.0, "DRY", "above 0 discourages repeating whole passages", group="dry", between=(0.0, 100.0), order=8,
        slider=Slider(0.0, 5.0, 0.1), api=Api(llamacpp="dry_multiplier"),
        detail="\"Don't repeat yourself\": if the latest L tokens occur earlier in the text, multiplier * base ** "
        "(L - allowed length), at most 100, is subtracted from the logit of the token that followed "
        "there. The longest L counts. https://github.com/oobabooga/text-generation-webui/pull/5677"
    )
    dry_base: float = parameter(
        1.75, "DRY base", "how fast DRY's penalty grows with the length of the repetition", group="dry",
        between=(1.0, 10.0), slider=Slider(1.0, 4.0, 0.05), api=Api(llamacpp="dry_base")
    )
    dry_allowed_length: int = parameter(
        2, "DRY allowed length", "DRY ignores repetitions shorter than this many tokens", group="dry",
        between=(1, 64), slider=Slider(1, 64, 1), api=Api(llamacpp="dry_allowed_length")
    )
    dry_range: int = parameter(
        -1, "DRY range", "how many of the latest tokens DRY covers; -1 = all, 0 = none", group="dry",
        between=(-1, _MAX_INT), slider=Slider(-1, 4096, 64), api=Api(llamacpp="dry_penalty_last_n"),
        detail="The prompt counts."
    )
    dry_breakers: tuple[str, ...] = parameter(
        ("\n", ":", '"', "*"), "DRY breakers", "text that ends a repetition for DRY", group="penalties",
        api=Api(llamacpp="dry_sequence_breakers"),
        detail="A token that contains one of them ends a repetition and is never penalized itself."
    )
    temperature: float = parameter(
        1.0, "Temperature", "0 always takes the most likely token; higher is more random", group="sampling",
        between=(0.0, 100.0), order=1, slider=Slider(0.0, 2.0, 0.05),
        api=Api(openai="temperature", llamacpp="temperature", generation_config="temperature"),
        detail="Logits are divided by it. At 0 (below 1e-5) the largest logit after the penalties wins, the "
        "lowest id among equals, and the filters below are skipped."
    )
    mirostat_tau: float = parameter(
        0.0, "Mirostat", "target surprise in bits per token; replaces the other filters; 0 = off", group="sampling",
        between=(0.0, 100.0), order=10, slider=Slider(0.0, 10.0, 0.5),
        api=Api(llamacpp="mirostat_tau", generation_config="mirostat_tau"),
        detail="Mirostat 2, https://arxiv.org/abs/2007.14966: keeps the tokens up to a surprise (-log2 of the "
        "probability) that is adjusted after every token so that it is this on average; 5 is usual. At "
        "least one token is kept."
    )
    mirostat_eta: float = parameter(
        0.1, "Mirostat rate", "how fast Mirostat adjusts", group="sampling", between=(0.0, 1.0),
        slider=Slider(0.0, 1.0, 0.05), api=Api(llamacpp="mirostat_eta", generation_config="mirostat_eta"),
        detail="The fraction of the last error by which the surprise limit moves."
    )
    top_n_sigma: float = parameter(
        0.0, "Top-n sigma", "keep logits within n standard deviations of the largest; 0 = off", group="sampling",
        between=(0.0, 100.0), slider=Slider(0.0, 5.0, 0.1), api=Api(llamacpp="top_n_sigma"),
        detail="Logits of -inf do not count; temperature does not change what is kept. "
        "https://arxiv.org/abs/2411.07641"
    )
    top_k: int = parameter(
        0, "Top-k", "sample from the k most likely tokens; 0 = all", group="sampling", between=(0, _MAX_INT), order=3,
        slider=Slider(0, 200, 5), api=Api(llamacpp="top_k", generation_config="top_k"),
        detail="Logits equal to the k-th are kept too."
    )
    top_p: float = parameter(
        1.0, "Top-p", "sample from the most likely tokens that together reach this probability; 1 = all",
        group="sampling", between=(0.0, 1.0), order=2, slider=Slider(0.05, 1.0, 0.05),
        api=Api(openai="top_p", llamacpp="top_p", generation_config="top_p"),
        detail="At least one is kept; among equals the highest ids."
    )
    min_p: float = parameter(
        0.0, "Min-p", "drop tokens less likely than this fraction of the most likely one", group="sampling",
        between=(0.0, 1.0), order=4, slider=Slider(0.0, 1.0, 0.01),
        api=Api(llamacpp="min_p", generation_config="min_p")
    )
    typical_p: float = parameter(
        1.0, "Typical-p",
        "sample from the tokens of most typical surprise that together reach this probability; 1 = all",
        group="sampling", between=(0.0, 1.0), slider=Slider(0.05, 1.0, 0.05),
        api=Api(llamacpp="typical_p", generation_config="typical_p"),
        detail="Those whose surprise is nearest to the entropy come first; all as near as the last are kept. "
        "The most likely token may be dropped. https://arxiv.org/abs/2202.00666"
    )
    epsilon_cutoff: float = parameter(
        0.0, "Epsilon cutoff", "drop tokens less likely than this probability; 0 = off", group="sampling",
        between=(0.0, 1.0), slider=Slider(0.0, 0.01, 0.0005), api=Api(generation_config="epsilon_cutoff"),
        detail="At least one is kept. Usual values are 3e-4 to 9e-4. https://arxiv.org/abs/2210.15191"
    )
    eta_cutoff: float = parameter(
        0.0, "Eta cutoff", "drop tokens less likely than this, or than the entropy suggests; 0 = off",
        group="sampling", between=(0.0, 1.0), slider=Slider(0.0, 0.01, 0.0005),
        api=Api(generation_config="eta_cutoff"),
        detail="The limit is the smaller of eta and sqrt(eta) * exp(-entropy). At least one is kept. Usual values "
        "are 3e-4 to 2e-3. https://arxiv.org/abs/2210.15191"
    )
    xtc_probability: float = parameter(
        0.0, "XTC", "how often the most likely tokens are excluded; 0 = off", group="sampling", between=(0.0, 1.0),
        order=9, slider=Slider(0.0, 1.0, 0.05),
        api=Api(llamacpp="xtc_probability", generation_config="xtc_probability"),
        detail='"Exclude top choices": for this fraction of tokens, all candidates at least xtc_threshold '
        "likely are dropped except the least likely of them. "
        "https://github.com/oobabooga/text-generation-webui/pull/6335"
    )
    xtc_threshold: float = parameter(
        0.1, "XTC threshold", "probability from which XTC counts a token as a top choice", group="sampling",
        between=(0.0, 1.0), slider=Slider(0.0, 0.5, 0.01),
        api=Api(llamacpp="xtc_threshold", generation_config="xtc_threshold"),
        detail="Above 0.5 there are no two such tokens, and nothing happens."
    )
    seed: int | None = parameter(
        None, "Seed", "the same seed gives the same answer; off = random each time", group="output",
        between=(0, 2**64 - 1), order=12, slider=Slider(0, 2**32, 1, start=1),
        api=Api(openai="seed", llamacpp="seed"),
        detail="On the same machine."
    )
    max_tokens: int = parameter(
        512, "Max tokens", "maximum answer length in tokens, reasoning included", group="limits",
        between=(1, _MAX_INT), order=11, slider=Slider(1, 32_768, 64),
        api=Api(openai="max_tokens", llamacpp="n_predict", generation_config="max_new_tokens")
    )
    stop: tuple[str, ...] = parameter(
        (), "Stop strings", "end the answer before any of these texts", group="limits", order=15,
        api=Api(openai="stop", llamacpp="stop", generation_config="stop_strings"),
        detail="One string may be given alone. Reasoning is not searched."
    )
    stop_token_ids: tuple[int, ...] = parameter(
        (), "Stop tokens", "end the text, reasoning included, at these token ids", group="limits"
    )
    constraint: Constraint | None = parameter(  # noqa: RUF009 (a dataclass field)
        None, "Constraint",
        "what the answer must conform to: JSON, a JSON schema, a regular expression, a grammar or a choice",
        group="output",
        detail="Reasoning is not constrained."
    )
    reasoning_budget: int | None = parameter(
        None, "Reasoning budget", "maximum reasoning length in tokens; off = no limit", group="reasoning",
        between=(0, _MAX_INT), order=13, slider=Slider(0, 32_768, 64, start=256),
        detail="After that many, only the tokens that end the reasoning can be drawn."
    )
    logprobs: int | None = parameter(
        None, "Log-probabilities", "report this many alternatives for each token; off = none", group="output",
        between=(0, 20), order=14, slider=Slider(0, 20, 1, start=5),
        api=Api(openai="top_logprobs", llamacpp="n_probs"),
        detail="0 to 20 alternatives besides the token drawn, from the model's own distribution, before any "
        "parameter acts."
    )
    # fmt: on

    def __post_init__(self) -> None:
        for name, spec in PARAMETERS.items():
            object.__setattr__(self, name, spec.checked(getattr(self, name)))


PARAMETERS: Mapping[str, ParameterSpec] = specs_of(SamplingParams)
"""Every sampling parameter by name, in the order in which they act."""

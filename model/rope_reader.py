"""`read_rope`: reads rotary positions and their scaling from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping

from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    longrope_amplitude,
    yarn_amplitude,
)
from llm_edge.runtime.safe_io import short_repr

_MAX_DIVISORS = 2_048


def read_rope(
    config: ConfigReader,
    head_dim: int,
    theta: float = 10_000.0,
    *,
    theta_key: str = "rope_theta",
    fraction_key: str | None = None,
    fraction: float = 1.0,
    layer_type: str | None = None,
    aliases: Mapping[str, str] | None = None,
    original_length: int | None = None,
) -> Rope:
    """Read rotary positions in the format of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    A setting that transformers ignores in this family is rejected, because the config's author must have expected it
    to have an effect.

    Args:
        config: the whole config.
        head_dim: D.
        theta: the family's default base.
        theta_key: top-level key of the base.
        fraction_key: top-level key of the fraction of a head that is rotated; None for families that rotate whole
            heads.
        fraction: the family's default fraction.
        layer_type: entry of `rope_parameters` to read, in families that have one per layer type.
        aliases: additional names of scaling types, such as `su` for `longrope`.
        original_length: the family's default for `original_max_position_embeddings`, if it has one.

    Raises:
        CheckpointError: a value is invalid, or the scaling is not supported.
    """
    theta = config.number(theta_key, theta)
    fraction = config.number(fraction_key, fraction) if fraction_key is not None else fraction
    if "rope_parameters" in config and "rope_scaling" in config:
        config.fail("rope_parameters and rope_scaling are both set: keep one of them")
    field = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    section = config.section(field)
    if section is not None and field == "rope_parameters" and layer_type is not None:
        section = section.section(layer_type)
        if section is None:
            config.fail(f"rope_parameters has no {layer_type}: this family requires one entry per layer type")
    elif section is not None and section.has_sections:
        section.refuse("has one entry per layer type, which this family does not support")
    if section is not None:
        theta = section.number("rope_theta", theta)
        fraction = section.number("partial_rotary_factor", fraction)
    if not 0 < fraction <= 1:  # also rejects NaN
        config.fail(f"partial_rotary_factor is {fraction}; it must be above 0 and at most 1")
    if fraction_key is None and (fraction != 1 or config.number("partial_rotary_factor", 1.0) != 1):
        config.refuse("partial_rotary_factor is set, which is not supported in this family")
    if not 1 <= theta <= 1e12:
        config.fail(f"{theta_key} is {theta}; it must be 1 to 1e12")
    dim = int(head_dim * fraction)
    if section is None:
        return Rope(theta, dim)
    kind = section.text("rope_type", section.text("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    return Rope(theta, dim, _scaling(kind, config, section, field, Rope(theta, dim), original_length))


def _scaling(
    kind: str, config: ConfigReader, section: ConfigReader, field: str, rope: Rope, default_length: int | None
) -> RopeScaling | None:
    if kind == "default":
        return None
    length = config.integer("max_position_embeddings", 2048)
    original = _original_length(config, section, length, default_length)
    if kind == "linear":
        return LinearScaling(section.positive("factor"))
    if kind == "llama3":
        low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
        if low >= high:
            section.fail(f"low_freq_factor ({low}) is not below high_freq_factor ({high})")
        return Llama3Scaling(section.positive("factor"), low, high, original)
    if kind == "yarn":
        if rope.theta <= 1:
            section.fail("yarn requires a rope_theta above 1")
        return _yarn_scaling(section, length / original, original)
    if kind == "longrope":
        default = longrope_amplitude(section.positive("factor", length / original), original)
        amplitude = section.positive("attention_factor", default)
        short, long = (_divisors(section, key, rope.dim // 2) for key in ("short_factor", "long_factor"))
        return LongRopeScaling(short, long, original, amplitude)
    supported = "default, linear, llama3, yarn, longrope"
    return config.refuse(f"{field} of type {short_repr(kind)} is not supported; supported: {supported}")


def _original_length(config: ConfigReader, section: ConfigReader, length: int, default: int | None) -> int:
    """Context length of pre-training; the key may be in the section or at the top level."""
    original = section.integer("original_max_position_embeddings", length)
    if "original_max_position_embeddings" in config or default is not None:
        outer = config.integer("original_max_position_embeddings", default)
        if original not in (outer, length):
            section.fail(f"original_max_position_embeddings is {original}, but {outer} at the top level of the config")
        original = outer
    if original < 2:
        section.fail(f"original_max_position_embeddings is {original}; it must be at least 2")
    return original


def _yarn_scaling(section: ConfigReader, stretch: float, original: int) -> YarnScaling:
    def bounded(key: str, default: float) -> float:
        value = section.number(key, default)
        if not 1e-3 <= value <= 1e6:
            section.fail(f"{key} is {value}; it must be 0.001 to 1000000")
        return value

    factor = section.positive("factor", stretch)
    amplitude = yarn_amplitude(factor)
    if section.number("mscale", 0) and section.number("mscale_all_dim", 0):
        scales = bounded("mscale", 1), bounded("mscale_all_dim", 1)
        amplitude = yarn_amplitude(factor, scales[0]) / yarn_amplitude(factor, scales[1])
    return YarnScaling(
        factor,
        original,
        bounded("beta_fast", 32),
        bounded("beta_slow", 1),
        section.positive("attention_factor", amplitude),
        section.flag("truncate", True),
    )


def _divisors(section: ConfigReader, key: str, length: int) -> tuple[float, ...]:
    """Read the frequency divisors of LongRoPE."""
    value = section.value(key)
    valid = isinstance(value, list) and len(value) == length <= _MAX_DIVISORS
    if not valid or not all(
        isinstance(item, int | float) and not isinstance(item, bool) and 0 < item < 1e30 for item in value
    ):
        section.fail(f"{key} is not a list of {length} positive numbers")
    return tuple(map(float, value))

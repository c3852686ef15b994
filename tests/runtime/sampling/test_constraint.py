"""Constraints: answers follow the grammar whatever the logits are, and bad grammars are rejected in one line."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling import grammar
from llm_edge.runtime.sampling.constraint import MAX_BYTES, Constraint
from llm_edge.runtime.sampling.grammar import MAX_CACHED, ConstraintCompiler, ConstraintProcessor
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import Row

PADDED = 49_280  # SmolLM2 has 49,152 tokens; graphs may have more rows
ENDS = (2, 0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"\n', "ü"]}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/home"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "owned": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: tuple[dict[str, Any], ...] = (
    PERSON,
    {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    {"enum": [1, "one", None, {"one": [1]}]},
    {"type": "string", "maxLength": 15},
)


@pytest.fixture(scope="module")
def backend(smollm2_file: Any) -> Backend:
    return Backend.from_str(read_tokenizer(GGUFFile(smollm2_file)).tokenizer_json)


@pytest.fixture(scope="module")
def constraints(backend: Backend) -> ConstraintCompiler:
    return ConstraintCompiler(backend.to_str(), PADDED, ENDS)


@pytest.fixture(scope="module")
def logits() -> Row:
    """Random logits [64, V] in which the padding tokens are the most probable."""
    logits = 3 * np.random.default_rng(0).standard_normal((64, PADDED)).astype(np.float32)
    logits[:, 49_152:] += 30
    return logits


@pytest.fixture(scope="module")
def small() -> ConstraintCompiler:
    return ConstraintCompiler(tiny.tokenizer().to_str(), 331, [2])


def answer(processor: ConstraintProcessor, logits: Row, seed: int, limit: int = 300) -> list[int]:
    """Sample until only an end token may follow, as the generation loop does."""
    params = SamplingParams(temperature=1.5, top_p=0.999, seed=seed)
    sampler = Sampler(params, [5, 6, 7], [processor])
    order = random.Random(seed)
    for _ in range(limit):
        token = sampler.sample(logits[order.randrange(len(logits))])
        processor.accept(token)
        if processor.finished:
            break
    tokens = list(sampler.generated)
    return tokens[:-1] if tokens[-1] in ENDS else tokens


def follows(value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a JSON value conforms to a schema; supports only the keywords used in this file."""
    if "$ref" in schema:
        return follows(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(follows(value, one, whole) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            properties = schema["properties"]
            known = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(properties)
            return known and all(follows(item, properties[key], whole) for key, item in value.items())
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(follows(item, schema["items"], whole) for item in value)
        case "string":
            fits = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
            return fits and re.search(schema.get("pattern", ""), value) is not None
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case kind:
            number = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
            return number and schema["minimum"] <= value <= schema["maximum"]


def allowed(processor: ConstraintProcessor, tokens: Sequence[int], size: int = 331) -> set[int]:
    row = np.zeros(size, np.float32)
    out = processor(row, tokens)
    assert not row.any()
    return set(np.flatnonzero(np.isfinite(out)).tolist())


# ---- outputs


def test_all_of_200_answers_conform_to_their_json_schema(
    constraints: ConstraintCompiler, backend: Backend, logits: Row
) -> None:
    seen = set()
    for seed in range(200):
        schema = SCHEMAS[seed % len(SCHEMAS)]
        text = backend.decode(answer(constraints.start(Constraint.json_schema(schema)), logits, seed))
        assert follows(json.loads(text), schema, schema), text
        seen.add(text)
    assert len(seen) > 100


def test_json_object_mode_yields_a_json_object(constraints: ConstraintCompiler, backend: Backend, logits: Row) -> None:
    steered = logits.copy()
    likely = {token for text in ('"', "}", '":', '"}', "]", "1") for token in backend.encode(text).ids}
    steered[:, sorted(likely)] += 12  # otherwise strings become very long
    for seed in range(20):
        text = backend.decode(answer(constraints.start(Constraint.json()), steered, seed, limit=2000))
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern", [r"[A-Z][a-z]{1,9} [0-9]{4}-[0-9]{2}", r"(?:ab|c{1,3}d){2,5}é?", r"[^a]{3}|漢{1,4}🙂"]
)
def test_answers_match_the_regular_expression(
    pattern: str, constraints: ConstraintCompiler, backend: Backend, logits: Row
) -> None:
    for seed in range(30):
        text = backend.decode(answer(constraints.start(Constraint.regex(pattern)), logits, seed))
        assert re.fullmatch(pattern, text), text


def test_choices_may_contain_any_characters(constraints: ConstraintCompiler, backend: Backend, logits: Row) -> None:
    options = [
        "yes",
        "yes, please",
        "(.*)",
        "a|b",
        "\\d+",
        "[x]",
        "{2}",
        "^é$",
        "漢字🙂",
        '"\n\t',
        " -&&~#/ ",
        "\x00\x7f",
    ]
    seen = {
        backend.decode(answer(constraints.start(Constraint.choice(options)), logits, seed), skip_special_tokens=False)
        for seed in range(150)
    }
    assert seen <= set(options)
    assert len(seen) > 6
    for option in options:  # each option is accepted, and no other text
        processor = constraints.start(Constraint.choice(tuple(options)))
        for token in backend.encode(option).ids:
            processor.accept(token)
        assert processor.finished == (option != "yes")


def test_thousands_of_choices_are_supported(constraints: ConstraintCompiler, backend: Backend, logits: Row) -> None:
    options = [f"item {n} text" for n in range(20_000)]
    for seed in range(5):
        text = backend.decode(answer(constraints.start(Constraint.choice(options)), logits, seed))
        assert re.fullmatch(r"item \d+ text", text)
        assert text in options


def test_lark_grammars_may_be_recursive(constraints: ConstraintCompiler, backend: Backend, logits: Row) -> None:
    steered = logits.copy()
    steered[:, backend.encode(")").ids] += 9
    grammar = 'start: "(" (start | /[a-z]{1,4}/) ")"'
    depths = set()
    for seed in range(40):
        text = backend.decode(answer(constraints.start(Constraint.lark(grammar)), steered, seed, limit=1000))
        depth = len(text) - len(text.lstrip("("))
        assert re.fullmatch(rf"\({{{depth}}}[a-z]{{1,4}}\){{{depth}}}", text), text
        depths.add(depth)
    assert len(depths) > 1


# ---- end tokens


def test_an_answer_ends_only_where_the_grammar_allows_it(small: ConstraintCompiler) -> None:
    text = tiny.tokenizer()
    (a,), (b,), (c,) = (text.encode(char).ids for char in "abc")
    processor = small.start(Constraint.regex("ab+"))
    assert 2 not in allowed(processor, [7])
    assert allowed(processor, [7, a]) >= {b}
    assert 2 not in allowed(processor, [7, a])
    assert {2, b} <= allowed(processor, [7, a, b])
    assert not processor.finished
    assert not {0, 1, a, c} & allowed(processor, [7, a, b, b])
    processor.accept(2)
    assert processor.finished
    processor = small.start(Constraint.choice(["ab"]))
    for token in (a, b):
        assert not processor.finished
        processor.accept(token)
    assert processor.finished
    assert allowed(processor, [7]) == {2}


def test_padding_and_special_tokens_are_never_allowed(small: ConstraintCompiler) -> None:
    processor = small.start(Constraint.regex("(?s:.){5}"))
    assert not allowed(processor, []) & {0, 1, 2, *range(320, 331)}
    assert allowed(processor, [], size=400) < set(range(320))  # logits wider than the declared vocabulary


def test_a_mask_that_leaves_no_token_is_an_error(small: ConstraintCompiler) -> None:
    sampler = Sampler(SamplingParams(seed=0), [1], [small.start(Constraint.choice(["ä"]))])
    with pytest.raises(ParameterError, match=r"^constraint \(choice\): no token of .* fits here$"):
        sampler.sample(np.zeros(3, np.float32))  # a vocabulary that ends before the required token
    row = np.zeros(331, np.float32)
    row[3:] = -np.inf
    with pytest.raises(ParameterError, match="no token of"):
        small.start(Constraint.choice(["ä"]))(row, [1])


def test_accepting_a_forbidden_token_is_an_error(small: ConstraintCompiler) -> None:
    processor = small.start(Constraint.regex("a+"))
    processor(np.zeros(331, np.float32), [1])
    with pytest.raises(ParameterError, match=r"^constraint \(regex\): the answer cannot continue: [^\n]+$"):
        processor(np.zeros(331, np.float32), [1, *tiny.tokenizer().encode("x").ids])


def test_a_grammar_that_becomes_too_complex_is_an_error_and_not_an_end(small: ConstraintCompiler) -> None:
    grammar = 'start: "go " c\nc: ' + " | ".join(f'"x{n}"' for n in range(2500))
    processor, tokens = small.start(Constraint.lark(grammar)), [7]

    def draw(text: str) -> None:
        for token in tiny.tokenizer().encode(text).ids:
            assert allowed(processor, tokens)
            tokens.append(token)
        processor(np.zeros(331, np.float32), tokens)

    with pytest.raises(ParameterError, match=r"^constraint \(lark\): the answer cannot continue: [^\n]+ 2000[^\n]+$"):
        draw("go x")
    assert len(tokens) > 1


# ---- reasoning before the answer


@dataclass
class Thinking:
    """A fake reasoning parser."""

    inside: bool


def test_the_mask_applies_only_after_the_reasoning() -> None:
    start, end = 318, 319
    waiting = ConstraintCompiler(tiny.tokenizer().to_str(), 331, [2], never=(start, end))
    (a,) = tiny.tokenizer().encode("a").ids
    rule = Constraint.regex("(?s:.)+")
    everything = set(range(331))
    for prompt in ([start], [end], [7, start, 9]):  # delimiters in the prompt do not end the reasoning
        thinking = Thinking(True)
        processor = waiting.start(rule, thinking)
        tokens = list(prompt)
        for token in (9, 2, 0, 330, start):
            assert allowed(processor, tokens) == everything
            assert not processor.finished
            assert processor.forced_tokens(5) == []
            tokens.append(token)
        assert allowed(processor, tokens) == everything
        thinking.inside = False
        assert not {start, end, 2, 0} & allowed(processor, [*tokens, end])
        assert {2, a} <= allowed(processor, [*tokens, end, a])


def test_a_model_may_start_with_reasoning_or_the_answer() -> None:
    start, end = 318, 319
    waiting = ConstraintCompiler(tiny.tokenizer().to_str(), 331, [2], never=(start, end))
    (a,) = tiny.tokenizer().encode("a").ids
    for first, rest in ((start, set(range(331))), (a, {2})):
        thinking = Thinking(False)
        processor = waiting.start(Constraint.choice(["a"]), thinking, [start])
        assert allowed(processor, [1]) == {a, start}
        thinking.inside = first == start
        assert allowed(processor, [1, first]) == rest
        assert processor.finished == (first == a)
    assert allowed(waiting.start(Constraint.choice(["a"]), Thinking(False), [start]), [start]) == {a, start}


# ---- speculative decoding


def test_masks_for_several_tokens_equal_those_computed_step_by_step(
    constraints: ConstraintCompiler, backend: Backend, logits: Row
) -> None:
    rule = Constraint.json_schema(PERSON)
    drawn = answer(constraints.start(rule), logits, 3)
    stepwise = constraints.start(rule)
    prompt = [5, 6]
    masks = [stepwise(logits[0], [*prompt, *drawn[:n]]) for n in range(len(drawn))]
    for stride in (2, 3, 7):
        leaping, accepting = constraints.start(rule), constraints.start(rule)
        for n in range(0, len(drawn), stride):
            assert np.array_equal(leaping(logits[0], [*prompt, *drawn[:n]]), masks[n])
            assert np.array_equal(accepting(logits[0], [*prompt, *drawn[:n]]), masks[n])
            for token in drawn[n : n + stride]:
                accepting.accept(token)


def test_forced_tokens_are_proposed_as_draft_tokens(
    constraints: ConstraintCompiler, backend: Backend, logits: Row
) -> None:
    rule = Constraint.json_schema(PERSON)
    drawn = answer(constraints.start(rule), logits, 4)
    processor, untouched = constraints.start(rule), constraints.start(rule)
    text, proposals = backend.decode(drawn), 0
    for n, token in enumerate(drawn):
        draft_tokens = processor.forced_tokens(8)
        assert processor.forced_tokens(2) == draft_tokens[:2]
        assert processor.forced_tokens(0) == []
        assert text.startswith(backend.decode([*drawn[:n], *draft_tokens]))
        assert np.array_equal(processor(logits[0], drawn[:n]), untouched(logits[0], drawn[:n]))
        proposals += bool(draft_tokens)
        processor.accept(token)
        untouched.accept(token)
    assert proposals > 3
    assert processor.finished
    assert processor.forced_tokens(8) == []


# ---- concurrency and caching


def test_processors_of_two_threads_are_independent(backend: Backend, logits: Row) -> None:
    shared = ConstraintCompiler(backend.to_str(), PADDED, ENDS)  # not used yet, so both threads initialize it
    alone = ConstraintCompiler(backend.to_str(), PADDED, ENDS)
    rule = Constraint.json_schema(PERSON)
    wanted = {seed: answer(alone.start(rule), logits, seed) for seed in range(12)}
    found: dict[int, list[int]] = {}

    def run(seeds: range) -> None:
        for seed in seeds:
            found[seed] = answer(shared.start(rule), logits, seed)

    threads = [threading.Thread(target=run, args=(range(n, 12, 2),)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_a_schema_is_compiled_once(constraints: ConstraintCompiler) -> None:
    schema = {"enum": [f"value {n}" for n in range(20_000)]}
    text = json.dumps(schema, indent=2)
    began = time.process_time()
    constraints.start(Constraint.json_schema(schema))
    first = time.process_time() - began
    rule = Constraint.json_schema(text)
    began = time.process_time()
    for _ in range(1000):
        constraints.start(rule)
    assert time.process_time() - began < 100 * first


def test_more_constraints_than_the_cache_holds_still_work(small: ConstraintCompiler) -> None:
    rules = [Constraint.choice([f"{'a' * n}b"]) for n in range(3 * MAX_CACHED)]
    for rule in rules + rules[::-1]:
        assert allowed(small.start(rule), [])


def test_complexity_limits_apply_to_each_answer_separately(
    constraints: ConstraintCompiler, backend: Backend, logits: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"type": "array", "items": {"type": "string", "pattern": "^(.*a.{4}|b.*c{3}d.*)$"}, "maxItems": 1}
    rule = Constraint.json_schema(schema)
    wanted = [answer(constraints.start(rule), logits, seed, limit=25) for seed in range(60)]
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 200)  # enough for one answer, but not for all of them together
    narrow = ConstraintCompiler(backend.to_str(), PADDED, ENDS)
    assert [answer(narrow.start(rule), logits, seed, limit=25) for seed in range(60)] == wanted
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 40)  # too few for one answer
    narrow = ConstraintCompiler(backend.to_str(), PADDED, ENDS)
    with pytest.raises(ParameterError, match=r"^constraint \(json_schema\): [^\n]*too many states[^\n]*$"):
        answer(narrow.start(rule), logits, 0, limit=25)


# ---- invalid constraints


def test_constraints_are_hashable_values() -> None:
    one, other = Constraint.json_schema({"type": "null"}), Constraint.json_schema(' {"type" : "null"}')
    assert one == other
    assert len({one, other, Constraint.json(), Constraint.regex("a"), Constraint.lark("a")}) == 4
    assert Constraint.json_schema(True).text == "{}"
    assert SamplingParams() == SamplingParams()
    with pytest.raises(AttributeError):
        one.text = "x"  # type: ignore[misc]


NO_TEXT: Any = (None, 1, b"a", "", ["a"])
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        *(("regex", lambda v=value: Constraint.regex(v)) for value in (*NO_TEXT, "\ud800", "a" * 40_000)),
        *(("lark", lambda v=value: Constraint.lark(v)) for value in (*NO_TEXT, "a" * 40_000)),
        *(("choice", lambda v=v: Constraint.choice(v)) for v in ([], "ab", ["a", "a"], ["a", ""], [1], {"a"}, None)),
        ("choice", lambda: Constraint.choice(["a" * MAX_BYTES, "b"])),
        *(
            ("json_schema", lambda v=value: Constraint.json_schema(v))
            for value in (None, 1, [], False, "", "1", "[]", "{", "NaN", "false", {"a": object()}, {"a": 1e999})
        ),
        *(("json_schema", lambda v=v: Constraint.json_schema(v)) for v in ({"a": LOOP}, {"\ud800": 1}, '"\\ud800"')),
        ("json_schema", lambda: Constraint.json_schema("[" * 100_000)),
        ("json_schema", lambda: Constraint.json_schema({"enum": ["a" * MAX_BYTES]})),
    ],
)
def test_invalid_constraints_are_rejected(kind: str, make: Callable[[], Constraint]) -> None:
    with pytest.raises(ParameterError, match=rf"^constraint \({kind}\): [^\n]+$"):
        make()


def test_an_unknown_constraint_kind_is_rejected() -> None:
    with pytest.raises(ParameterError, match=r"^constraint: unknown kind 'gbnf'; use one of json, [^\n]+$"):
        Constraint("gbnf", "x")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Constraint.regex("("), "unclosed group"),
        (Constraint.regex("x" * 500 + "("), "unclosed group"),
        (Constraint.regex("(?=a)b"), "look-around"),
        (Constraint.regex("[a&&b]"), "nothing can match it"),
        (Constraint.lark("start: foo"), 'unknown name: "foo"'),
        (Constraint.lark("{}"), ""),
        (Constraint.json_schema({"type": "nonsense"}), "nonsense"),
        (Constraint.json_schema({"not": {"pattern": "a"}}), "/not: cannot be enforced"),
        (Constraint.json_schema({"$ref": "http://localhost/x"}), "http://localhost/x"),
        (Constraint.json_schema({"$ref": "#"}), "nothing can match it"),
        (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "nothing can match it"),
        (Constraint.json_schema({"multipleOf": 1_000_003}), "multipleOf"),
    ],
)
def test_invalid_grammars_are_rejected(
    rule: Constraint, reason: str, small: ConstraintCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ParameterError, match=rf"^constraint \({rule.kind}\): [^\n]+$") as refused:
        small.start(rule)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 400
    assert capfd.readouterr() == ("", "")


def nested(depth: int) -> str:
    return "a" if depth == 0 else f"({nested(depth - 1)}){{1,20}}"


def chain(count: int) -> Constraint:
    """Nested objects by reference, deep enough to overflow a thread's default stack."""
    links = {
        f"a{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}, "required": ["x"]}
        for n in range(count)
    }
    return Constraint.json_schema({"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "string"}}})


HOSTILE = {
    "references": chain(2500),
    "rules": Constraint.lark("start: r0\n" + "\n".join(f'r{n}: r{n + 1} "a"' for n in range(1500)) + '\nr1500: "x"'),
    "nested json": Constraint.json_schema('{"items":' * 400 + "{}" + "}" * 400),
    "nested groups": Constraint.regex("(" * 10_000 + "a" + ")" * 10_000),
    "repetitions": Constraint.regex(nested(5)),
    "states": Constraint.regex("(.*a.{20}){50}"),
    "intersection": Constraint.lark("start: A\nA: /.*a.{15}/ & ~/.*b.{15}/"),
    "ambiguous": Constraint.lark('start: x\nx: x x | "a" | ""'),
    "left recursive": Constraint.lark("start: start start start start | /[a-z]*/"),
    "optional": Constraint.regex("a?" * 10_000),
    "length": Constraint.json_schema({"type": "string", "maxLength": 10**9}),
    "items": Constraint.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "product": Constraint.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(8)]} for i in range(8)]}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_rejected_within_seconds(name: str, constraints: ConstraintCompiler, logits: Row) -> None:
    constraints.start(Constraint.choice(["a"]))  # initializes the tokenizer
    began = time.process_time()
    refusal = ""
    try:
        answer(constraints.start(HOSTILE[name]), logits, 0, limit=30)
    except ParameterError as e:
        refusal = str(e)
    assert time.process_time() - began < 10
    assert not refusal or re.fullmatch(rf"constraint \({HOSTILE[name].kind}\): [^\n]{{1,400}}", refusal)


@pytest.mark.parametrize("ends", [[], [400], [-1]])
def test_a_model_without_end_tokens_is_rejected(ends: list[int]) -> None:
    with pytest.raises(ParameterError, match=r"^constraint: the model has no end token[^\n]+$"):
        ConstraintCompiler(tiny.tokenizer().to_str(), 331, ends).start(Constraint.json())


def test_a_tokenizer_without_byte_tokens_is_rejected() -> None:
    words = Backend(models.WordLevel({"a": 0, "b": 1, "end": 2}, unk_token="a"))
    for text, size in ((words.to_str(), 3), ("tokenizer.json", 331), ("{}", 331), (tiny.tokenizer().to_str(), 100)):
        with pytest.raises(
            ParameterError, match=r"^constraint: constraints do not work with this model's tokenizer: [^\n]+$"
        ):
            ConstraintCompiler(text, size, [2]).start(Constraint.json())

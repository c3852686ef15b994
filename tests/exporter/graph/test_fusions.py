"""Tests of passes that simplify or fuse nodes: the outputs stay equal, and what looks alike is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llm_edge.exporter.graph.passes.rms_norms import fuse_rms_norms
from llm_edge.exporter.graph.passes.rotary import fuse_rotary
from llm_edge.exporter.graph.passes.skip_norms import fuse_skip_norms
from llm_edge.exporter.graph.passes.views import simplify_views

_HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
BATCH, LENGTH = 2, 3


def parse(text: str) -> ir.Model:
    """A graph in ONNX's text format, with the shapes of all values."""
    model = onnx.parser.parse_model(f"{_HEADER}\n{text}")
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


def run(model: ir.Model) -> list[npt.NDArray[Any]]:
    """The outputs for random inputs."""
    random = np.random.default_rng(0)
    inputs = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        sizes = [size if isinstance(size, int) else {"B": BATCH, "S": LENGTH}[str(size.value)] for size in value.shape]
        inputs[value.name] = random.standard_normal(sizes, np.float32)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def apply(text: str, apply_pass: Callable[[ir.Model], None]) -> list[str]:
    """The operators after a pass, which must not change the outputs; without constants."""
    before, after = parse(text), parse(text)
    apply_pass(after)
    for wanted, found in zip(run(before), run(after), strict=True):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2e-6
    return [node.op_type for node in after.graph if node.op_type != "Constant"]


def norm(body: str, inputs: str = "", initializers: str = "") -> str:
    """A graph over x [B, S, 8] with the constants `two`, `last`, `epsilon` and `scale`."""
    values = "float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}"
    return f"""norm (float[B, S, 8] x{inputs}) => (float[B, S, 8] y)
        <{values}, float two = {{2}}, int64[1] last = {{-1}}, float epsilon = {{1e-5}}, float one = {{1}}{initializers}>
        {{ {body} }}"""


_INVERSE = "p = Pow(x, two) m = ReduceMean<keepdims=1>(p, last) e = Add(m, epsilon) s = Sqrt(e)"


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        (f"{_INVERSE} r = Reciprocal(s) n = Mul(x, r) y = Mul(scale, n)", ["RMSNormalization"]),
        (f"{_INVERSE} r = Div(one, s) n = Mul(r, x) y = Mul(n, scale)", ["RMSNormalization"]),
        (f"{_INVERSE} y = Div(x, s)", ["RMSNormalization"]),
        (f"{_INVERSE} n = Div(x, s) o = Add(scale, one) y = Mul(n, o)", ["Add", "RMSNormalization"]),
        # the normed values are used twice
        (f"{_INVERSE} n = Div(x, s) m2 = Mul(n, scale) y = Add(m2, n)", ["RMSNormalization", "Mul", "Add"]),
        # unit length
        (
            "p = Mul(x, x) m = ReduceSum<keepdims=1>(p, last) e = Add(m, epsilon) s = Sqrt(e) y = Div(x, s)",
            ["RMSNormalization"],
        ),
    ],
)
def test_norms_become_one_node(body: str, operators: list[str]) -> None:
    assert apply(norm(body), fuse_rms_norms) == operators


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        # over another axis
        ("p = Mul(x, x) m = ReduceMean(p, axis) e = Add(m, epsilon) s = Sqrt(e) y = Div(x, s)", ""),
        # of another tensor
        ("p = Mul(z, z) m = ReduceMean(p, last) e = Add(m, epsilon) s = Sqrt(e) y = Div(x, s)", ", float[B, S, 8] z"),
        # of a product
        ("p = Mul(x, z) m = ReduceMean(p, last) a = Abs(m) e = Add(a, epsilon) s = Sqrt(e) y = Div(x, s)",
         ", float[B, S, 8] z"),
        # the root over the norm
        ("p = Mul(x, x) m = ReduceMean(p, last) e = Add(m, epsilon) s = Sqrt(e) y = Div(s, x)", ""),
        # another power
        ("p = Pow(x, four) m = ReduceMean(p, last) e = Add(m, epsilon) s = Sqrt(e) y = Div(x, s)", ""),
    ],
)  # fmt: skip
def test_other_arithmetic_is_not_fused_to_norms(body: str, inputs: str) -> None:
    text = norm(body, inputs, ", int64[1] axis = {1}, float four = {4}")
    if "Div(s, x)" in text:
        text = text.replace("Div(s, x)", "Div(s, e)").replace("float[B, S, 8] y", "float[B, S, 1] y")
    assert "RMSNormalization" not in apply(text, fuse_rms_norms)


def skip(a: str, b: str, body: str, outputs: str = "float[B, S, 8] y, float[B, S, 8] z") -> str:
    return f"""skip ({a} a, {b} b, float[8] scale) => ({outputs})
        {{ t = Add(a, b) {body} }}"""


_NORM = "n = RMSNormalization<axis=-1, epsilon=1e-5>(t, scale) y = Abs(n)"
_SKIP = "SkipSimplifiedLayerNormalization"


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        (skip("float[B, S, 8]", "float[B, S, 8]", f"{_NORM} z = Neg(t)"), [_SKIP, "Abs", "Neg"]),
        # the sum is used before the norm
        (skip("float[B, S, 8]", "float[B, S, 8]", f"z = Neg(t) {_NORM}"), [_SKIP, "Neg", "Abs"]),
        # two norms of a sum
        (
            skip("float[B, S, 8]", "float[B, S, 8]", f"{_NORM} z = RMSNormalization<axis=-1>(t, scale)"),
            [_SKIP, "Abs", "RMSNormalization"],
        ),
        # a bias, a row for all tokens, heads
        (skip("float[B, S, 8]", "float[8]", f"{_NORM} z = Neg(t)"), ["Add", "RMSNormalization", "Abs", "Neg"]),
        (skip("float[B, S, 8]", "float[B, 1, 8]", f"{_NORM} z = Neg(t)"), ["Add", "RMSNormalization", "Abs", "Neg"]),
        (
            skip(*["float[B, S, 4, 8]"] * 2, f"{_NORM} z = Neg(t)", "float[B, S, 4, 8] y, float[B, S, 4, 8] z"),
            ["Add", "RMSNormalization", "Abs", "Neg"],
        ),
    ],
)
def test_only_sums_of_hidden_states_are_fused_with_their_norms(text: str, operators: list[str]) -> None:
    assert apply(text, fuse_skip_norms) == operators


def views(output: str, body: str, initializers: str) -> str:
    return f"""views (float[B, S, 32] x) => ({output} y)
        <{initializers}>
        {{ {body} }}"""


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        # heads and back
        (
            views(
                "float[B, S, 32]",
                "h = Reshape(x, heads) f = Reshape(h, flat) y = Neg(f)",
                "int64[4] heads = {0, 0, 4, 8}, int64[3] flat = {0, 0, 32}",
            ),
            ["Neg"],
        ),
        # the shape of other views in between does not matter
        (
            views(
                "float[B, S, 4, 8]",
                "u = Unsqueeze(x, one) s = Squeeze(u, one) y = Reshape(s, heads)",
                "int64[1] one = {1}, int64[4] heads = {0, 0, 4, 8}",
            ),
            ["Reshape"],
        ),
        (
            views(
                "float[B, S, 4, 8]",
                """h = Reshape(x, heads) t = Transpose<perm=[0, 2, 1, 3]>(h)
                   b = Transpose<perm=[0, 2, 1, 3]>(t) y = Neg(b)""",
                "int64[4] heads = {0, 0, 4, 8}",
            ),
            ["Reshape", "Neg"],
        ),
        (
            views(
                "float[8, B, S, 4]",
                "h = Reshape(x, heads) t = Transpose<perm=[0, 2, 1, 3]>(h) y = Transpose<perm=[3, 0, 2, 1]>(t)",
                "int64[4] heads = {0, 0, 4, 8}",
            ),
            ["Reshape", "Transpose"],
        ),
        # a transpose between two reshapes is not a view
        (
            views(
                "float[B, S, 32]",
                "h = Reshape(x, heads) t = Transpose<perm=[0, 1, 3, 2]>(h) f = Reshape(t, flat) y = Neg(f)",
                "int64[4] heads = {0, 0, 4, 8}, int64[3] flat = {0, 0, 32}",
            ),
            ["Reshape", "Transpose", "Reshape", "Neg"],
        ),
        # an output of the graph keeps its node
        (
            views("float[B, S, 32]", "y = Reshape(x, flat)", "int64[3] flat = {0, 0, 32}"),
            ["Reshape"],
        ),
    ],
)
def test_views_are_merged(text: str, operators: list[str]) -> None:
    assert apply(text, simplify_views) == operators


def test_two_unknown_dimensions_are_not_replaced_by_constants() -> None:
    text = """views (float[B, S, 32] x) => (float[S, B, 32] y)
        <int64[3] order = {1, 0, 2}, int64 axis = {0}>
        { s = Shape(x) o = Gather(s, order) r = Reshape(x, o) y = Neg(r) }"""
    model = parse(text)
    reshaped = next(node for node in model.graph if node.op_type == "Reshape").outputs[0]
    reshaped.shape = ir.Shape(["S", "B", 32])
    simplify_views(model)
    assert [node.op_type for node in model.graph] == ["Shape", "Gather", "Reshape", "Neg"]


# ---- rotary positions


def rotary(
    body: str, x: str = "float[B, S, 4, 8]", angles: int = 4, axis: int = 2, initializers: str = "", result: str = ""
) -> str:
    """A graph over x, with `cos` and `sin` of angles f for all heads, from `axis` on."""
    order = "heads = Identity(x)" if axis == 2 else "heads = Transpose<perm=[0, 2, 1, 3]>(x)"
    return f"""rotary ({x} x, float[B, S, {angles}] f) => ({result or x} y)
        <int64[1] heads_axis = {{{axis}}}, int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] end = {{9999}},
         int64[1] last = {{3}}, int64[1] one = {{1}}, int64[1] two = {{2}}, float factor = {{1.25}}{initializers}>
        {{ {order} {body} }}"""


_FULL = """ff = Concat<axis=-1>(f, f) c = Cos(ff) s = Sin(ff) cf = Mul(c, factor) sf = Mul(factor, s)
    cos = Unsqueeze(cf, heads_axis) sin = Unsqueeze(sf, heads_axis)"""
_HALVES = "a = Slice(heads, zero, half, last, one) b = Slice(heads, half, end, last, one)"
_TURNED = "nb = Neg(b) turned = Concat<axis=-1>(nb, a) xc = Mul(heads, cos) ts = Mul(turned, sin)"
_BACK = "t = Transpose<perm=[0, 2, 1, 3]>(r) y = Identity(t)"


def fused(text: str) -> list[str]:
    """The operators after fusing rotations, without views and what computes angles."""

    def passes(model: ir.Model) -> None:
        simplify_views(model)
        fuse_rotary(model)
        simplify_views(model)

    ignored = {"Reshape", "Unsqueeze", "Identity", "Cos", "Sin"}
    return [each for each in apply(text, passes) if each not in ignored]


_ONCE = ["Mul", "Mul", "RotaryEmbedding"]  # the factor of cosines and sines


@pytest.mark.parametrize(
    "text",
    [
        rotary(f"{_FULL} {_HALVES} {_TURNED} y = Add(xc, ts)"),
        rotary(f"{_FULL} {_HALVES} {_TURNED} r = Add(ts, xc) {_BACK}", axis=1),
        # halves that a split returns
        rotary(f"{_FULL} a, b = Split<axis=3, num_outputs=2>(heads) {_TURNED} y = Add(xc, ts)"),
    ],
)
def test_rotations_of_halves_become_one_node(text: str) -> None:
    assert fused(text) == _ONCE


def test_rotations_of_neighbours_become_one_node() -> None:
    repeat = "Expand({0}, twice) {1} = Reshape({0}r, flat)"
    body = f"""col = Unsqueeze(f, minus) colr = {repeat.format("col", "ff")} c = Cos(ff) s = Sin(ff)
        cos = Unsqueeze(c, heads_axis) sin = Unsqueeze(s, heads_axis)
        a = Slice(heads, zero, end, last, two) b = Slice(heads, one, end, last, two) nb = Neg(b)
        nbc = Unsqueeze(nb, minus) ac = Unsqueeze(a, minus) pairs = Concat<axis=-1>(nbc, ac)
        turned = Reshape(pairs, whole) xc = Mul(heads, cos) ts = Mul(turned, sin) y = Add(xc, ts)"""
    constants = """, int64[1] minus = {-1}, int64[4] twice = {1, 1, 1, 2}, int64[3] flat = {0, 0, 8},
        int64[4] whole = {0, 0, 4, 8}"""
    text = rotary(body, initializers=constants)
    assert fused(text) == ["RotaryEmbedding"]
    assert "RotaryEmbedding" not in fused(text.replace("Concat<axis=-1>(nbc, ac)", "Concat<axis=-1>(ac, nbc)"))


def test_products_of_halves_become_one_node() -> None:
    body = f"""c = Cos(f) s = Sin(f) cos = Unsqueeze(c, heads_axis) sin = Unsqueeze(s, heads_axis) {_HALVES}
        ac = Mul(a, cos) bs = Mul(b, sin) first = Sub(ac, bs) bc = Mul(b, cos) as = Mul(a, sin) second = Add(bc, as)
        y = Concat<axis=-1>(first, second)"""
    assert fused(rotary(body)) == ["RotaryEmbedding"]
    # even and odd elements are moved apart
    neighbours = body.replace(
        _HALVES,
        _HALVES.replace("half, last, one", "end, last, two").replace("half, end, last, one", "one, end, last, two"),
    )
    assert fused(rotary(neighbours)) == ["Slice", "Slice", "Concat", "RotaryEmbedding"]
    # not a rotation
    assert "RotaryEmbedding" not in fused(rotary(body.replace("Add(bc, as)", "Add(bc, bs)")))


def test_the_rest_of_a_partly_rotated_head_is_included() -> None:
    rotated = f"{_FULL} {_HALVES} {_TURNED}".replace("heads", "part").replace("part_axis", "heads_axis")
    part = "part = Slice(heads, zero, rotated, last, one) rest = Slice(heads, rotated, end, last, one)"
    body = f"{part} {rotated} p = Add(xc, ts) y = Concat<axis=-1>(p, rest)"
    text = rotary(body, "float[B, S, 4, 12]", initializers=", int64[1] rotated = {8}")
    assert fused(text) == _ONCE
    # the rest comes first
    assert fused(text.replace("(p, rest)", "(rest, p)")).count("Slice") == 2


@pytest.mark.parametrize(
    "text",
    [
        # the elements of a pair have angles of their own
        rotary(
            f"{_FULL.replace('Concat<axis=-1>(f, f)', 'Identity(f)')} {_HALVES} {_TURNED} y = Add(xc, ts)", angles=8
        ),
        rotary(
            f"g = Neg(f) {_FULL.replace('Concat<axis=-1>(f, f)', 'Concat<axis=-1>(f, g)')} {_HALVES} {_TURNED} "
            "y = Add(xc, ts)"
        ),
        # heads have angles of their own
        rotary(
            f"""{_FULL.replace("cos = ", "c1 = ").replace("sin = ", "s1 = ")} cos = Mul(c1, scales)
            sin = Mul(s1, scales) {_HALVES} {_TURNED} y = Add(xc, ts)""",
            initializers=", float[4, 1] scales = {1, 2, 3, 4}",
        ),
        # the halves are not turned
        rotary(f"{_FULL} {_HALVES} {_TURNED.replace('(nb, a)', '(a, nb)')} y = Add(xc, ts)"),
        # of another tensor
        rotary(f"{_FULL} z = Abs(heads) {_HALVES.replace('heads', 'z')} {_TURNED} y = Add(xc, ts)"),
    ],
)
def test_other_arithmetic_is_not_fused_to_rotations(text: str) -> None:
    assert "RotaryEmbedding" not in fused(text)


def test_angles_are_computed_once_for_queries_and_keys() -> None:
    keys = f"{_HALVES} {_TURNED} k = Add(xc, ts)"
    for name in ("heads", "turned", "xc", "ts", "nb"):
        keys = keys.replace(name, f"{name}2")
    keys = (
        keys.replace("a = ", "a2 = ").replace(", a)", ", a2)").replace("b = S", "b2 = S").replace("Neg(b)", "Neg(b2)")
    )
    body = f"{_FULL} {_HALVES} {_TURNED} q = Add(xc, ts) heads2 = Neg(q) {keys} y = Abs(k)"
    assert fused(rotary(body)) == ["Mul", "Mul", "RotaryEmbedding", "Neg", "RotaryEmbedding", "Abs"]

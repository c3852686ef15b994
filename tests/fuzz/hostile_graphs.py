"""Bundles with hostile ONNX graphs: forbidden operators, subgraphs, foreign files, odd shapes and types, bombs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from damaged_bundles import ask, copy, correct_manifest
from onnx import TensorProto, helper, numpy_helper
from sandbox import Command

NAME = "onnx/model.onnx"
OPERATORS = ("Loop", "If", "Scan", "SequenceMap", "Optional", "NonZero", "Unique", "Tile", "Expand", "ConstantOfShape")
OPERATORS += ("Range", "OneHot", "Pad", "Resize", "RandomNormal", "EyeLike", "StringSplit", "RegexFullMatch", "TopK")
DOMAINS = ("ai.onnx.ml", "com.microsoft", "com.evil", "ai.onnx.training", "com.microsoft.nchwc", "\0")
LOCATIONS = (
    "../checkpoint/model.safetensors",
    "/etc/passwd",
    "model.onnx_data\0x",
    "",
    "model.onnx",
    "./model.onnx_data",
)
LOCATIONS += ("onnx/model.onnx_data", "model_quantized.onnx_data", "\u2028", "x" * 5000, "//etc/passwd", "/dev/zero")
NUMBERS = (0, -1, 1, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
TYPES = tuple(TensorProto.DataType.values())


def value_info(name: str, kind: int = TensorProto.INT64, shape: Any = (None, None)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(graph: Any, name: str, values: Any) -> str:
    """An initializer."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def loop(rng: random.Random, depth: int = 0) -> Any:
    """A node with a subgraph."""
    body_nodes = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["i"], ["o"])]
    if depth < rng.choice((0, 3, 60)):
        body_nodes.append(loop(rng, depth + 1))
    body = helper.make_graph(
        body_nodes,
        "body",
        [value_info("i", shape=()), value_info("c", TensorProto.BOOL, ())],
        [value_info("c2", TensorProto.BOOL, ()), value_info("o", shape=())],
    )
    kind = rng.choice(("Loop", "If", "Scan", "Add", "Constant"))
    names = {"If": ("then_branch", "else_branch")}.get(kind, ("body",))
    return helper.make_node(kind, ["", ""], [f"loop{depth}"], **dict.fromkeys(names, body))


def subgraph(model: Any, rng: random.Random) -> str:
    node = loop(rng)
    model.graph.node.insert(rng.randrange(len(model.graph.node)), node)
    return f"a {node.op_type} with a subgraph"


def operator(model: Any, rng: random.Random) -> str:
    node = rng.choice(model.graph.node)
    old, node.op_type = node.op_type, rng.choice((*OPERATORS, *sorted({n.op_type for n in model.graph.node})))
    if rng.random() < 0.3:
        node.domain = rng.choice(DOMAINS)
    return f"{old} replaced by {node.domain}.{node.op_type}"


def external(model: Any, rng: random.Random) -> str:
    tensors = [each for each in model.graph.initializer if each.external_data] or list(model.graph.initializer)
    tensor = rng.choice(tensors)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    tensor.data_location = TensorProto.EXTERNAL
    key = rng.choice(("location", "location", "location", "offset", "length", "checksum", "odd"))
    odd = rng.choice((str(rng.choice(NUMBERS)), "", "1e9", " 5", "0x10", "9" * 5000, "-1", "\u0663"))
    entries[key] = rng.choice(LOCATIONS) if key == "location" else odd
    del tensor.external_data[:]
    tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
    return f"{key} of the weights {tensor.name} is {entries[key][:40]!r}"


def shapes(model: Any, rng: random.Random) -> str:
    tensor = rng.choice(model.graph.initializer)
    dims = list(tensor.dims)
    if rng.random() < 0.5:
        dims = rng.choice(([2**20, 2**20], [2**62, 2], [0], [], [-1, 4], [1] * 50, [2**63 - 1], [3, 5, 7]))
    elif dims:
        dims[rng.randrange(len(dims))] = rng.choice(NUMBERS)
    del tensor.dims[:]
    tensor.dims.extend(dims)
    return f"shape of {tensor.name} is {dims}"


def types(model: Any, rng: random.Random) -> str:
    what = rng.choice(("tensor", "input", "output", "attribute", "cast"))
    if what == "tensor":
        tensor = rng.choice(model.graph.initializer)
        tensor.data_type = rng.choice((*TYPES, 99, -1))
        return f"type of {tensor.name} is {tensor.data_type}"
    if what in ("input", "output"):
        value = rng.choice(getattr(model.graph, what))
        value.type.tensor_type.elem_type = rng.choice(TYPES)
        return f"type of {what} {value.name}"
    nodes = [node for node in model.graph.node if node.attribute]
    attribute = rng.choice(rng.choice(nodes).attribute)
    attribute.type = rng.choice(list(onnx.AttributeProto.AttributeType.values()))
    return f"type of attribute {attribute.name}"


def attributes(model: Any, rng: random.Random) -> str:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    attribute = rng.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.INTS:
        del attribute.ints[:]
        attribute.ints.extend(rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 4, 100))))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    else:
        attribute.s = rng.choice((b"", b"\xff\xfe", b"x" * 10**6))
    return f"attribute {attribute.name} of {node.op_type}"


def wiring(model: Any, rng: random.Random) -> str:
    nodes = model.graph.node
    node, other = rng.choice(nodes), rng.choice(nodes)
    how = rng.choice(
        ("input", "output", "cycle", "remove", "shuffle", "no input", "graph input", "rename", "duplicate")
    )
    if how == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*other.output, *other.input, "missing", ""])
    elif how == "output":
        node.output[0] = rng.choice((other.output[0], "", "logits", "input_ids"))
    elif how == "cycle" and node.input:
        node.input[0] = node.output[0]
    elif how == "remove":
        del nodes[rng.randrange(len(nodes))]
    elif how == "shuffle":
        mixed = rng.sample(list(nodes), len(nodes))
        del nodes[:]
        nodes.extend(mixed)
    elif how == "no input":
        del node.input[:]
    elif how == "graph input":
        del model.graph.input[rng.randrange(len(model.graph.input))]
    elif how == "rename":
        rng.choice([*model.graph.input, *model.graph.output]).name = rng.choice(("logits", "x", "", "\0", "input_ids"))
    else:
        nodes.extend([node] * rng.choice((1, 150_000)))
    return f"{how} at {node.op_type}"


def extras(model: Any, rng: random.Random) -> str:
    how = rng.choice(("functions", "sparse", "opset", "version", "training", "metadata", "strings", "no graph", "many"))
    if how == "functions":
        function = helper.make_function("x", "f", ["a"], ["b"], [helper.make_node("Abs", ["a"], ["b"])], [])
        model.functions.append(function)
    elif how == "sparse":
        values, indices = (
            numpy_helper.from_array(np.ones(1, np.float32), "s"),
            numpy_helper.from_array(np.zeros(1, np.int64)),
        )
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))
    elif how == "opset":
        model.opset_import[0].version = rng.choice((0, -1, 1, 6, 99, 2**40))
    elif how == "version":
        model.ir_version = rng.choice((0, 1, 99, 2**31))
    elif how == "training":
        model.training_info.add()
    elif how == "metadata":
        model.metadata_props.append(onnx.StringStringEntryProto(key="x" * 10**6, value="\0" * 10**6))
    elif how == "strings":
        tensor = helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b" * 10**6])
        model.graph.initializer.append(tensor)
    elif how == "no graph":
        model.ClearField("graph")
    else:
        model.graph.output.extend([model.graph.output[0]] * 20_000)
    return how


def bomb(model: Any, rng: random.Random) -> str:
    """Allowed operators whose results are huge, or need an endless time."""
    graph, rounds = model.graph, rng.choice((12, 22, 30, 45))
    how = rng.choice(("concat", "range", "outer", "matmul", "constant concat", "cast range", "split", "gather"))
    start, nodes = "input_ids", []
    if how == "constant concat":
        start = constant(graph, "bomb", np.ones((1, 64), np.int64))
    if how in ("concat", "constant concat", "split"):
        for i in range(rounds):
            nodes.append(helper.make_node("Concat", [start, start], [f"bomb{i}"], axis=1))
            start = f"bomb{i}"
    elif how in ("range", "cast range"):
        names = [
            constant(graph, f"bomb{i}", np.int64(value)) for i, value in enumerate((0, 10 ** rng.choice((7, 9, 12)), 1))
        ]
        if how == "cast range":  # so that not all inputs are constant
            nodes.append(helper.make_node("ReduceMax", [start], ["zero"], keepdims=0))
            nodes.append(helper.make_node("Mul", ["zero", names[0]], ["start"]))
            names[0] = "start"
        nodes.append(helper.make_node("Range", names, ["bombed"]))
        start = "bombed"
    elif how in ("outer", "gather"):
        for i in range(rng.choice((2, 4, 6))):
            axes = constant(graph, f"axes{i}", np.array([1], np.int64))
            nodes.append(helper.make_node("Unsqueeze", [start, axes], [f"high{i}"]))
            kind, end = ("Add", "input_ids") if how == "outer" else ("Gather", f"high{i}")
            nodes.append(helper.make_node(kind, [f"high{i}", end], [f"bomb{i}"]))
            start = f"bomb{i}"
    else:
        nodes.append(helper.make_node("Cast", [start], ["bomb"], to=TensorProto.FLOAT))
        wide = constant(graph, "wide", np.ones((1, 10**6), np.float32))
        axes = constant(graph, "axes", np.array([-1], np.int64))
        nodes += [
            helper.make_node("Unsqueeze", ["bomb", axes], ["tall"]),
            helper.make_node("MatMul", ["tall", wide], ["w"]),
        ]
        start = "w"
    nodes.append(helper.make_node("ReduceMax", [start], ["bomb_end"], keepdims=0))
    nodes.append(helper.make_node("Cast", ["bomb_end"], ["bomb_float"], to=TensorProto.FLOAT))
    last = next(node for node in graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "real_logits"
    nodes.append(helper.make_node("Add", ["real_logits", "bomb_float"], ["logits"]))
    graph.node.extend(nodes)
    return f"{how}, {rounds} rounds"


CHANGES: tuple[Callable[[Any, random.Random], str], ...] = (
    subgraph, operator, external, shapes, types, attributes, wiring, extras, bomb, bomb,
)  # fmt: skip


def make(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A bundle with a hostile graph."""
    bundle = copy(originals, folder)
    path = bundle / NAME
    model = onnx.load(path, load_external_data=False)
    chosen = [CHANGES[number % len(CHANGES)], *(rng.choice(CHANGES[:-1]) for _ in range(rng.choice((0, 0, 1))))]
    what = ", ".join(change(model, rng) for change in chosen if model.HasField("graph"))
    path.write_bytes(model.SerializeToString())
    if rng.random() < 0.3:  # also the file of weights may hold anything
        (bundle / f"{NAME}_data").write_bytes(rng.randbytes((bundle / f"{NAME}_data").stat().st_size))
    correct_manifest(bundle, NAME, f"{NAME}_data")
    return ask(what, "--precision", "fp32")

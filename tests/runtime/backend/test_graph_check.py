"""`check_graph`: exported graphs pass; anything else is rejected before onnxruntime reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from mutate import mutations
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from llm_edge.runtime.backend.graph_check import OPERATORS, check_graph
from llm_edge.runtime.errors import BundleError


@pytest.fixture
def graph(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of an int8 graph and its weights."""
    for name in ("model_quantized.onnx", "model_quantized.onnx_data"):
        shutil.copy(tiny_bundle / "onnx" / name, tmp_path / name)
    return tmp_path / "model_quantized.onnx"


def edited(path: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def message_of(path: Path) -> str:
    try:
        check_graph(path)
    except BundleError as error:
        return str(error)
    return ""


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        check_graph(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a graph that llm-export writes: ")
    assert message.endswith(": export the bundle again")
    assert message.isprintable()
    return message


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_portable_bundle"])
def test_exported_graphs_are_accepted(fixture: str, request: pytest.FixtureRequest) -> None:
    graphs = sorted(request.getfixturevalue(fixture).rglob("*.onnx"))
    assert len(graphs) == 3
    for path in graphs:
        check_graph(path)


def endless() -> GraphProto:
    return helper.make_graph([], "body", [], [])


def added(node: NodeProto) -> Callable[[ModelProto], object]:
    return lambda model: model.graph.node.append(node)


def subgraph_in(op_type: str, attribute: str) -> Callable[[ModelProto], object]:
    return added(helper.make_node(op_type, ["input_ids"], ["more"], **{attribute: endless()}))


@pytest.mark.parametrize(
    "op_type", ["Loop", "Scan", "If", "SequenceMap", "NonZero", "Resize", "OneHot", "RandomUniform"]
)
def test_other_operators_are_rejected(graph: Path, op_type: str) -> None:
    assert ("", op_type) not in OPERATORS
    assert repr(op_type) in refusal(edited(graph, added(helper.make_node(op_type, ["input_ids"], ["more"]))))


@pytest.mark.parametrize("domain", ["ai.onnx.ml", "com.example", "com.microsoft.nchwc", "ai.onnx.training"])
def test_other_domains_are_rejected(graph: Path, domain: str) -> None:
    model = onnx.load(graph, load_external_data=False)
    edited(graph, added(helper.make_node("Add", ["input_ids", "input_ids"], ["more"], domain=domain)))
    assert domain in refusal(graph)
    graph.write_bytes(model.SerializeToString())
    edited(graph, lambda model: model.opset_import.append(helper.make_opsetid(domain, 1)))
    assert domain in refusal(graph)


@pytest.mark.parametrize("attribute", ["body", "then_branch", "axes"])
def test_subgraphs_are_rejected_in_any_attribute(graph: Path, attribute: str) -> None:
    refusal(edited(graph, subgraph_in("Add", attribute)))
    listed = AttributeProto(name=attribute, type=AttributeProto.GRAPHS, graphs=[endless()])
    refusal(edited(graph, lambda model: model.graph.node[0].attribute.append(listed)))


def test_functions_and_training_information_are_rejected(graph: Path) -> None:
    function = helper.make_function("", "Add", ["a"], ["b"], [], [helper.make_opsetid("", 21)])
    assert "field 25" in refusal(edited(graph, lambda model: model.functions.append(function)))
    edited(graph, lambda model: model.ClearField("functions"))
    check_graph(graph)
    assert "field 20" in refusal(edited(graph, lambda model: model.training_info.add()))


def test_a_second_graph_or_operator_name_is_rejected(graph: Path) -> None:
    """Readers of protobuf take the last one of two, or merge them."""
    content = graph.read_bytes()
    more = ModelProto(graph=GraphProto(node=[NodeProto(op_type="Loop")])).SerializeToString()
    graph.write_bytes(content + more)
    assert "2 graphs" in refusal(graph)
    twice = NodeProto(op_type="Add").SerializeToString() + NodeProto(op_type="Loop").SerializeToString()
    node = b"\x0a" + bytes([len(twice)]) + twice
    graph.write_bytes(b"\x3a" + bytes([len(node)]) + node)
    assert "field 4" in refusal(graph)


@pytest.mark.parametrize(
    "location",
    ["w", "model_quantized.onnx_data\0x", "./model_quantized.onnx_data", "/etc/passwd", "../model.onnx_data", "", "*"],
)
def test_weights_in_another_file_are_rejected(graph: Path, location: str) -> None:
    def change(model: ModelProto) -> None:
        weight = next(each for each in model.graph.initializer if each.external_data)
        next(entry for entry in weight.external_data if entry.key == "location").value = location

    assert "model_quantized.onnx_data" in refusal(edited(graph, change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "999999999"),
        ("offset", "-1"),
        ("offset", "x"),
        ("offset", "9" * 30),
        ("length", "1"),
        ("basepath", "/"),
    ],
)
def test_weights_outside_of_their_file_are_rejected(graph: Path, key: str, value: str) -> None:
    def change(model: ModelProto) -> None:
        weight = next(each for each in model.graph.initializer if each.external_data)
        entry = next((each for each in weight.external_data if each.key == key), None) or weight.external_data.add()
        entry.key, entry.value = key, value

    refusal(edited(graph, change))


def test_tensors_larger_than_their_values_are_rejected(graph: Path) -> None:
    for tensor in (
        TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[1 << 40]),
        TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20], raw_data=b"\0" * 4),
        TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[-1], raw_data=b"\0" * 4),
        TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"]),
    ):
        content = graph.read_bytes()
        refusal(edited(graph, lambda model, tensor=tensor: model.graph.initializer.append(tensor)))
        graph.write_bytes(content)
        constant = helper.make_node("Constant", [], ["more"], value=tensor)
        refusal(edited(graph, added(constant)))
        graph.write_bytes(content)


@pytest.mark.parametrize("op_type", ["Range", "Concat", "Gather", "Add", "MatMul"])
def test_constants_that_grow_while_loading_are_rejected(graph: Path, op_type: str) -> None:
    """onnxruntime computes them, and would allocate the result."""

    def change(model: ModelProto) -> None:
        limit = helper.make_tensor("limit", TensorProto.INT64, [], [10**9])
        model.graph.initializer.append(limit)
        model.graph.node.append(helper.make_node("Reshape", ["limit", "limit"], ["reshaped"]))
        model.graph.node.append(helper.make_node(op_type, ["limit", "reshaped", ""], ["more"]))

    assert "constant inputs only" in refusal(edited(graph, change))


def test_two_weights_with_the_same_name_are_rejected(graph: Path) -> None:
    def change(model: ModelProto) -> None:
        first = next(each for each in model.graph.initializer if each.external_data)
        model.graph.initializer.append(first)

    assert "same name" in refusal(edited(graph, change))


def test_weights_are_listed_with_their_place_in_the_file(graph: Path) -> None:
    tensors = {each.name: each for each in check_graph(graph)}
    weights = [each for each in onnx.load(graph, load_external_data=False).graph.initializer if each.external_data]
    assert tensors.keys() == {weight.name for weight in weights}
    for weight in weights:
        tensor, entries = tensors[weight.name], {entry.key: entry.value for entry in weight.external_data}
        assert (tensor.kind, tensor.dims) == (weight.data_type, tuple(weight.dims))
        assert (str(tensor.offset), str(tensor.size)) == (entries["offset"], entries["length"])


def test_nodes_that_are_not_sorted_are_rejected(graph: Path) -> None:
    def change(model: ModelProto) -> None:
        first = model.graph.node.pop(0)
        model.graph.node.append(first)

    assert "before it is computed" in refusal(edited(graph, change))


def test_damaged_files_are_accepted_or_rejected_in_one_line(graph: Path) -> None:
    original = graph.read_bytes()
    rejected = 0
    for content in mutations(original, 400, seed=5):
        graph.write_bytes(content)
        message = message_of(graph)
        assert "\n" not in message
        rejected += message != ""
    assert rejected > 100


@pytest.mark.parametrize(
    "content", [b"", b"\x3a", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20, b"\x3b" * 30, bytes(1000)]
)
def test_other_content_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refusal(tmp_path / "model.onnx")


@pytest.mark.parametrize("between", ["", "Identity", "Transpose"])
@pytest.mark.parametrize("width", [2, 4, 100])
def test_concatenations_that_multiply_their_size_are_rejected(graph: Path, between: str, width: int) -> None:
    def change(model: ModelProto) -> None:
        value = "input_ids"
        for i in range(7):
            model.graph.node.append(helper.make_node("Concat", [value] * width, [f"joined{i}"], axis=1))
            value = f"joined{i}"
            if between:
                model.graph.node.append(helper.make_node(between, [value], [f"between{i}"]))
                value = f"between{i}"

    assert "concatenated" in refusal(edited(graph, change))


def test_concatenations_in_many_layers_are_accepted(graph: Path) -> None:
    def change(model: ModelProto) -> None:
        weight = onnx.numpy_helper.from_array(np.ones((4, 2), np.float32), "joined_weight")
        model.graph.initializer.append(weight)
        model.graph.node.append(helper.make_node("Cast", ["input_ids"], ["x0"], to=TensorProto.FLOAT))
        for i in range(200):
            model.graph.node.append(helper.make_node("Concat", [f"x{i}", f"x{i}"], [f"joined{i}"], axis=1))
            model.graph.node.append(helper.make_node("MatMul", [f"joined{i}", "joined_weight"], [f"projected{i}"]))
            model.graph.node.append(helper.make_node("Add", [f"projected{i}", f"x{i}"], [f"x{i + 1}"]))

    check_graph(edited(graph, change))


@pytest.mark.parametrize("value", [10**12, -(10**12), 0])
@pytest.mark.parametrize("position", [0, 1])
def test_ranges_that_do_not_count_tokens_are_rejected(graph: Path, value: int, position: int) -> None:
    def change(model: ModelProto) -> None:
        add = model.graph.node.append
        add(helper.make_node("Constant", [], ["bound"], value_int=value))
        add(helper.make_node("Constant", [], ["one"], value_int=1))
        add(helper.make_node("Shape", ["input_ids"], ["shape"], start=1, end=2))
        add(helper.make_node("Squeeze", ["shape"], ["size"]))
        inputs = ["size", "size", "one"]
        inputs[position] = "bound"
        add(helper.make_node("Range", inputs, ["counted"]))

    changed = edited(graph, change)
    if value == 0 and position == 0:
        check_graph(changed)
    else:
        assert "Range" in refusal(changed)


def repeat(model: ModelProto, op_type: str, shape: str, times: int = 1) -> None:
    """Add nodes that repeat the tokens, one after another."""
    value = "input_ids"
    for number in range(times):
        inputs = [shape] if op_type == "ConstantOfShape" else [value, shape]
        model.graph.node.append(helper.make_node(op_type, inputs, [f"repeated{number}"]))
        value = f"repeated{number}"


def repeated_by(op_type: str, form: str, numbers: list[int]) -> Callable[[ModelProto], object]:
    def change(model: ModelProto) -> None:
        if form == "node":
            model.graph.node.append(helper.make_node("Constant", [], ["shape"], value_ints=numbers))
        else:
            model.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [len(numbers)], numbers))
        repeat(model, op_type, "shape")

    return change


@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize("op_type", ["Expand", "Tile", "Pad"])
def test_values_can_be_repeated_as_often_as_a_model_needs(graph: Path, op_type: str, form: str) -> None:
    check_graph(edited(graph, repeated_by(op_type, form, [-1, 128])))


@pytest.mark.parametrize("numbers", [[1 << 30, 1 << 30], [-(1 << 40), 1]])
@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize("op_type", ["Expand", "Tile", "ConstantOfShape", "Pad"])
def test_values_that_are_repeated_more_often_are_rejected(
    graph: Path, op_type: str, form: str, numbers: list[int]
) -> None:
    assert repr(op_type) in refusal(edited(graph, repeated_by(op_type, form, numbers)))


def test_repetitions_one_after_another_are_rejected(graph: Path) -> None:
    def change(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node("Constant", [], ["shape"], value_ints=[1, 256]))
        repeat(model, "Tile", "shape", times=4)

    assert "'Tile' repeats" in refusal(edited(graph, change))


@pytest.mark.parametrize("op_type", ["Mul", "Add", "ReduceMax"])
def test_shapes_that_are_computed_from_values_are_rejected(graph: Path, op_type: str) -> None:
    def change(model: ModelProto) -> None:
        add = model.graph.node.append
        add(helper.make_node("Shape", ["input_ids"], ["sizes"]))
        add(helper.make_node(op_type, ["sizes"] * (1 if op_type == "ReduceMax" else 2), ["shape"]))
        repeat(model, "Expand", "shape")

    assert "computed shape" in refusal(edited(graph, change))


def test_shapes_of_values_with_a_constant_are_accepted(graph: Path) -> None:
    def change(model: ModelProto) -> None:
        add = model.graph.node.append
        add(helper.make_node("Shape", ["input_ids"], ["rows"], start=0, end=1))
        add(helper.make_node("Constant", [], ["experts"], value_ints=[128]))
        add(helper.make_node("Concat", ["rows", "experts"], ["shape"], axis=0))
        repeat(model, "Expand", "shape")

    check_graph(edited(graph, change))


@pytest.mark.parametrize("op_type", ["Mul", "Add", "Cast"])
def test_ranges_over_computed_numbers_are_rejected(graph: Path, op_type: str) -> None:
    def change(model: ModelProto) -> None:
        add = model.graph.node.append
        add(helper.make_node("Constant", [], ["zero"], value_int=0))
        add(helper.make_node("Shape", ["input_ids"], ["shape"], start=1, end=2))
        add(helper.make_node("Squeeze", ["shape"], ["size"]))
        casts = {"to": TensorProto.FLOAT} if op_type == "Cast" else {}
        add(helper.make_node(op_type, ["size"] * (1 if casts else 2), ["computed"], **casts))
        add(helper.make_node("Range", ["zero", "computed", "size"], ["counted"]))

    assert "Range" in refusal(edited(graph, change))

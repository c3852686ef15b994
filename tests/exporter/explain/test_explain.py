"""`llm-export --explain` and `--plot`: the reported formats, sizes and errors match the files."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import tiny
from PIL import Image

from llm_edge.exporter import cli
from llm_edge.exporter.explain.report import explain
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.formats.source import OriginalBlocks
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.runtime import Bundle
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.installation import install_hint

Run = Callable[..., tuple[int, str, str]]
ROLES = {"attention.qkv": (256, 64), "attention.output": (64, 128), "mlp.gate_up": (256, 64), "mlp.down": (64, 128)}
PROJECTIONS = {f"layers.{layer}.{name}" for layer in range(2) for name in ROLES}
PRECISIONS = "fp32,int8,int8-exact,int4"
FP32 = Dense().to_dict()
INT8_BLOCKS = Blocks(8, 32, symmetric=True).to_dict()


@pytest.fixture(scope="module")
def short_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, 500)
        yield


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, short_texts: None
) -> tuple[Path, Path, str]:
    """A bundle exported with `--explain --plot`, the plot, and the output of the command."""
    folder = tmp_path_factory.mktemp("explained")
    bundle, picture = folder / "tiny", folder / "tiny.png"
    words = (tiny_checkpoint, "-o", bundle, "--precision", PRECISIONS, "--explain", "--plot", picture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llm-export", *map(str, words)])
        printed = folder / "printed"
        with printed.open("w", encoding="utf-8") as file:
            patch.setattr(sys, "stdout", file)
            with pytest.raises(SystemExit) as ended:
                cli.main()
    assert ended.value.code == 0
    return bundle, picture, printed.read_text(encoding="utf-8")


@pytest.fixture
def copied(exported: tuple[Path, Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "copied"))


def read(bundle: Path) -> Any:
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def write(bundle: Path, manifest: Mapping[str, Any]) -> None:
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def stored(bundle: Path, entry: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every initializer of a graph by name, as the onnx package reports them."""
    model = onnx.load(bundle / entry["model"], load_external_data=False)
    return {
        tensor.name: next((int(pair.value) for pair in tensor.external_data if pair.key == "length"), 0)
        or len(tensor.raw_data)
        for tensor in model.graph.initializer
    }


# ---- the manifest


def test_every_projection_has_a_format_size_and_error(exported: tuple[Path, Path, str]) -> None:
    for name, entry in read(exported[0])["precisions"].items():
        projections = entry["projections"]
        assert projections.keys() == PROJECTIONS | {"embed_tokens"} | (
            {"head_mix"} if RECIPES[name].calibrated else set()
        )
        for module in PROJECTIONS:
            measured = {"error", "divergence"} if RECIPES[name].calibrated else set()
            assert set(projections[module]) == {"format", "bytes"} | measured
            assert projections[module].get("error", 0.5) == float(f"{projections[module].get('error', 0.5):.4g}")
        assert "error" not in projections["embed_tokens"]


def test_sizes_match_the_files(exported: tuple[Path, Path, str]) -> None:
    bundle = exported[0]
    for name, entry in read(bundle)["precisions"].items():
        found = stored(bundle, entry)
        for module, one in entry["projections"].items():
            assert one["bytes"] == sum(size for key, size in found.items() if key.startswith(f"{module}.")), module
        files = sum((bundle / f"{entry['model']}{end}").stat().st_size for end in ("", "_data"))
        parts = sum(one["bytes"] for one in entry["projections"].values()) + sum(entry["other"].values())
        assert parts == files
        weights = sum(found.values())
        assert files - entry["other"]["graph"] == weights, name
        assert entry["other"]["norms"] == 5 * 4 * 64
        assert 0 < entry["other"]["graph"] < 200_000


def test_sizes_follow_from_formats_and_shapes(exported: tuple[Path, Path, str]) -> None:
    projections = {name: entry["projections"] for name, entry in read(exported[0])["precisions"].items()}
    for module in PROJECTIONS:
        rows, width = ROLES[module.partition(".")[2].partition(".")[2]]
        assert projections["fp32"][module] == {"format": Dense().to_dict(), "bytes": 4 * rows * width}
        for name in projections:
            stored_format = projections[name][module]["format"]
            if stored_format["kind"] == "blocks":
                form = Blocks(stored_format["bits"], stored_format["size"], stored_format["symmetric"])
                assert stored_format == form.to_dict()
                zeros = 0 if form.symmetric else rows * -(-form.num_blocks(width) * form.bits // 8)
                assert projections[name][module]["bytes"] == int(form.bytes_per_weight * rows * width) + zeros
            elif stored_format["kind"] == "int8_static":
                rest = (
                    projections[name][module]["bytes"] - rows * width - 4 * rows
                )  # scales of the activations and of the channels
                assert 4 <= rest <= 8 + 4 * width
    assert projections["fp32"]["embed_tokens"]["bytes"] == 4 * 331 * 64
    assert projections["int8"]["embed_tokens"].items() >= {"format": INT8_BLOCKS, "bytes": 331 * (64 + 8)}.items()


def test_errors_grow_with_fewer_bits(exported: tuple[Path, Path, str]) -> None:
    projections = {name: entry["projections"] for name, entry in read(exported[0])["precisions"].items()}
    for name, largest in (("int8-exact", 1e-2), ("int8", 1e-2), ("int4", 0.1)):
        assert all(0 < projections[name][module]["error"] < largest for module in PROJECTIONS)
    totals = [
        sum(it.get("divergence", 0) for it in projections[name].values()) for name in ("int8-exact", "int8", "int4")
    ]
    assert 0 < totals[0] <= totals[1] < totals[2]


def test_the_best_mixes_by_size_are_explained(exported: tuple[Path, Path, str], copied: Path) -> None:
    for name, entry in read(exported[0])["precisions"].items():
        points = [(point["bytes"], point["divergence"]) for point in entry.get("frontier", [])]
        assert bool(points) == RECIPES[name].calibrated
        assert points == sorted(points) == sorted(points, key=lambda point: (-point[1], point[0]))
        assert not points or points[0][0] <= Bundle.open(exported[0]).precisions[name].size * 1.1
    assert re.search(r"^best mixes, kB +[0-9]+ .*\nestimated KL +[0-9.e-]+ ", exported[2], re.MULTILINE)
    for wrong in ({}, [1], [{"bytes": 1}], [{"bytes": -1, "divergence": 0.1}], [{"bytes": 1, "divergence": 0.1}] * 99):
        manifest = read(copied)
        manifest["precisions"]["int8"]["frontier"] = wrong
        write(copied, manifest)
        with pytest.raises(BundleError, match=r"precisions\.int8\.frontier.*export the bundle again"):
            explain(Bundle.open(copied), ["int8"])


@pytest.mark.parametrize(("graph", "tied"), [("portable", True), ("fused", False)])
def test_other_graphs_are_explained_too(
    graph: str, tied: bool, tmp_path: Path, llm_export: Run, short_texts: None
) -> None:
    checkpoint = tiny.save_checkpoint(tmp_path / "source", tie_word_embeddings=tied, num_hidden_layers=1)
    words = (checkpoint, "-o", tmp_path / "made", "--precision", "int8,int4", "--graph", graph, "--no-validate")
    assert llm_export(*words)[0] == 0
    for name, entry in read(tmp_path / "made")["precisions"].items():
        projections = entry["projections"]
        mix = {"head_mix"} if tied else set()
        assert projections.keys() == {f"layers.0.{it}" for it in ROLES} | mix | {"embed_tokens", "lm_head"}
        if name == "int8":
            assert projections["embed_tokens"]["format"] == projections["lm_head"]["format"] == INT8_BLOCKS
            for module in ("embed_tokens", "lm_head"):
                assert projections[module]["bytes"] == 331 * (64 + 8)
        if name == "int4":
            assert any(it["format"]["label"].startswith("int4-") for it in projections.values())
        weights = sum(stored(tmp_path / "made", entry).values())
        assert (
            sum(it["bytes"] for it in projections.values()) + entry["other"]["norms"] + entry["other"]["tables"]
            == weights
        )


def test_the_report_does_not_depend_on_validation(
    exported: tuple[Path, Path, str], tiny_checkpoint: Path, tmp_path: Path, llm_export: Run, short_texts: None
) -> None:
    out = tmp_path / "again"
    code, text, _ = llm_export(
        tiny_checkpoint, "-o", out, "--precision", "int8", "--no-validate", "--explain", "--plot", tmp_path / "p.svg"
    )
    assert code == 0
    assert not re.search("mean KL [0-9]", text)
    first, second = (read(path)["precisions"]["int8"] for path in (exported[0], out))
    assert [first[key] for key in ("projections", "other")] == [second[key] for key in ("projections", "other")]
    assert "Not validated" in (tmp_path / "p.svg").read_text(encoding="utf-8")


# ---- the tables


def test_the_table_shows_each_projection_of_each_layer(exported: tuple[Path, Path, str]) -> None:
    bundle, _, text = exported
    assert all(len(line) <= 100 for line in text.partition("Plot: ")[0].splitlines())
    assert "\x1b" not in text
    for name, entry in read(bundle)["precisions"].items():
        table = text.partition(f"\n{name}: " if name != "fp32" else f"{name}: ")[2].partition("total")[0]
        projections = entry["projections"]
        for layer in range(2):
            cells = []
            for role in ROLES:
                one = projections[f"layers.{layer}.{role}"]
                cells += [one["format"]["label"], r"[0-9.]+"]
                if "error" in one:
                    cells.append(re.sub("e-0", "e-", f"{one['error']:.1e}"))
            label = str(layer) if RECIPES[name].calibrated else "0-1 each"
            assert re.search(rf"^{label} +{' +'.join(cells)} *$", table, re.MULTILINE), (cells, table)
        assert re.search(r"embedding, head +\S+ +[0-9.]+ kB", table)
    for entry in read(bundle)["precisions"].values():
        for one in entry["projections"].values():
            label, description = one["format"]["label"], one["format"]["description"]
            legend = rf"^{re.escape(label)} +{re.escape(description)}$"
            assert label == description or re.search(legend, text, re.MULTILINE)
    assert "error: mean over calibration tokens" in text


def test_sizes_in_the_table_add_up(exported: tuple[Path, Path, str], llm_export: Run) -> None:
    _, text, _ = llm_export(exported[0], "--explain", "--precision", "int8")
    lines = re.findall(r"^(\w.*?)  +(?:\S+ +)?([0-9.,]+) kB +([0-9.]+)%$", text, re.MULTILINE)
    sizes = {label: float(size.replace(",", "")) for label, size, _ in lines}
    assert sizes.keys() == {"layers", "embedding, head", "head_mix", "norms", "tables", "graph", "total"}
    info = Bundle.open(exported[0]).precisions["int8"]
    assert sizes["total"] == pytest.approx(info.size / 1e3, rel=0.01)
    assert sum(sizes.values()) == pytest.approx(2 * sizes["total"], rel=0.01)
    assert sum(float(share) for *_, share in lines) == pytest.approx(200, abs=0.4)
    layers = [re.findall(r"(?<= )[0-9.]+(?= )", line) for line in text.splitlines() if re.match(r"all ", line)]
    assert sum(map(float, layers[0])) == pytest.approx(sizes["layers"], rel=0.01)


def test_explaining_a_bundle_prints_the_same_as_its_export(exported: tuple[Path, Path, str], llm_export: Run) -> None:
    bundle, _, printed = exported
    before = sorted(bundle.rglob("*"))
    code, text, errors = llm_export(bundle, "--explain")
    assert (code, errors) == (0, "")
    assert text.strip()
    assert printed.startswith(text)
    assert sorted(bundle.rglob("*")) == before


def test_only_the_requested_precisions_are_explained(exported: tuple[Path, Path, str], llm_export: Run) -> None:
    code, text, _ = llm_export(exported[0], "--explain", "--precision", "int4, int8")
    assert code == 0
    assert re.findall(r"^(\S+): .* mean KL", text, re.MULTILINE) == ["int4", "int8"]


def test_json_output_has_the_same_content(exported: tuple[Path, Path, str], tmp_path: Path, llm_export: Run) -> None:
    code, text, _ = llm_export(exported[0], "--explain", "--progress", "json", "--plot", tmp_path / "p.png")
    assert code == 0
    *lines, last = [json.loads(line) for line in text.splitlines()]
    found = explain(Bundle.open(exported[0]))
    assert [line["name"] for line in lines] == [it.name for it in found] == PRECISIONS.split(",")
    assert lines[1]["layers"][0]["qkv"]["error"] == found[1].layers[0]["qkv"].error
    assert last == {"stage": "plot", "path": str(tmp_path / "p.png")}


def test_formats_of_all_recipes_have_short_unique_labels() -> None:
    forms = {
        form
        for recipe in RECIPES.values()
        for form in (recipe.projections, recipe.embedding, *itertools.chain(*recipe.choices.values()))
        if isinstance(form, Dense | Blocks | Int8Static)
    }
    assert len({form.label for form in forms}) == len({str(form) for form in forms}) == len(forms)
    assert max(len(form.label) for form in forms) <= 10
    assert OriginalBlocks(4, 32, offsets=True).label == "int4-32o"


# ---- the plot


def test_the_plot_of_an_export(exported: tuple[Path, Path, str]) -> None:
    _, picture, text = exported
    assert f"Plot: {picture}" in text
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 500
    colours = {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}
    assert {(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)} <= colours  # one line per role


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_plots_of_a_bundle(suffix: str, exported: tuple[Path, Path, str], tmp_path: Path, llm_export: Run) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for file in files:
        assert llm_export(exported[0], "--plot", file) == (0, f"Plot: {file}\n", "")
    first, second = (file.read_bytes() for file in files)
    assert first == second
    if suffix == ".svg":
        assert ElementTree.fromstring(first).tag.endswith("svg")
        for word in (*PRECISIONS.split(","), "layer", "qkv", "output", "gate_up", "down", "size, MB"):
            assert f"<!-- {word}".encode() in first
    elif suffix == ".pdf":
        assert first.startswith(b"%PDF-")
        assert first.rstrip().endswith(b"%%EOF")
    else:
        with Image.open(files[0]) as image:
            assert image.format == "PNG"
            image.verify()


def test_a_plot_without_quantized_weights(exported: tuple[Path, Path, str], tmp_path: Path, llm_export: Run) -> None:
    assert llm_export(exported[0], "--plot", tmp_path / "p.svg", "--precision", "fp32")[0] == 0
    assert "No errors were measured" in (tmp_path / "p.svg").read_text(encoding="utf-8")


# ---- errors


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, text, errors = outcome
    assert (code, text) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("p.gif", ".svg"),
        ("p", ".png"),
        ("none/p.png", "no folder"),
        ("taken.png", "folder"),
        ("file/p.png", "no folder"),
    ],
)
def test_an_invalid_plot_path_is_rejected_before_the_export(
    name: str, word: str, tiny_checkpoint: Path, tmp_path: Path, llm_export: Run
) -> None:
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    refused(llm_export(tiny_checkpoint, "-o", out, "--plot", tmp_path / name), "--plot", name, word)
    assert not out.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a read-only folder")
def test_an_unwritable_plot_folder_is_an_error(exported: tuple[Path, Path, str], llm_export: Run) -> None:
    refused(llm_export(exported[0], "--plot", "/proc/self/p.png"), "/proc/self/p.png", "cannot be written")


def test_without_matplotlib_the_error_names_the_extra(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = llm_export(tiny_checkpoint, "-o", tmp_path / "out", "--plot", tmp_path / "p.png")
    refused(outcome, "matplotlib", install_hint("plot"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [("--force",), ("-o", "elsewhere"), ("--graph", "fused"), ("--no-validate",), ("--n-heads", "4")]
)
def test_export_options_are_rejected_for_a_bundle(
    words: tuple[str, ...], exported: tuple[Path, Path, str], llm_export: Run
) -> None:
    refused(llm_export(exported[0], "--explain", *words), "omit it")


def test_a_precision_missing_from_the_bundle_is_an_error(exported: tuple[Path, Path, str], llm_export: Run) -> None:
    refused(llm_export(exported[0], "--explain", "--precision", "int4-mixed"), "int4-mixed", PRECISIONS.split(",")[-1])
    refused(llm_export(exported[0], "--explain", "--precision", ","), "--precision is empty")


def test_torchscript_bundles_cannot_be_explained(tiny_checkpoint: Path, tmp_path: Path, llm_export: Run) -> None:
    words = (tiny_checkpoint, "-o", tmp_path / "out", "--format", "torchscript", "--explain")
    refused(llm_export(*words), "--format torchscript")
    assert not (tmp_path / "out").exists()


def test_bundles_of_earlier_versions_load_and_report_what_is_missing(copied: Path, llm_export: Run) -> None:
    manifest = read(copied)
    for entry in manifest["precisions"].values():
        del entry["projections"], entry["other"]
    write(copied, manifest)
    assert Bundle.open(copied).precision("int8").size > 0
    refused(llm_export(copied, "--explain"), "manifest.json", "export the checkpoint again")


@pytest.mark.parametrize(
    ("module", "value"),
    [
        ("layers.0.mlp.down", {"format": FP32, "bytes": -1}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": True}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 1.5}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 10**400}),
        ("layers.0.mlp.down", {"format": {"label": "\x1b[2J", "description": "fp32"}, "bytes": 1}),
        ("layers.0.mlp.down", {"format": {"label": "fp32", "description": "x" * 1000}, "bytes": 1}),
        ("layers.0.mlp.down", {"format": 8, "bytes": 1}),
        ("layers.0.mlp.down", {"format": {"label": 8, "description": 8}, "bytes": 1}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 1, "error": "much"}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 1, "error": float("nan")}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 1, "error": 10**400}),
        ("layers.0.mlp.down", {"format": FP32, "bytes": 1, "error": -1.0}),
        ("layers.0.mlp.down", ["fp32", 1]),
        ("layers.2.mlp.down", {"format": FP32, "bytes": 1}),
        ("layers.0.other.down", {"format": FP32, "bytes": 1}),
        ("\x1b[2J", {"format": FP32, "bytes": 1}),
        ("", {"format": FP32, "bytes": 1}),
    ],
)
def test_invalid_manifest_values_are_errors(module: str, value: Any, copied: Path, llm_export: Run) -> None:
    manifest = read(copied)
    manifest["precisions"]["int8"]["projections"][module] = value
    write(copied, manifest)
    refused(llm_export(copied, "--explain"), "manifest.json", "int8")


@pytest.mark.parametrize(
    ("key", "value"), [("other", {"norms": 1}), ("other", 3), ("projections", []), ("quality", {"kl_mean": "low"})]
)
def test_damaged_manifest_entries_are_errors(key: str, value: Any, copied: Path, llm_export: Run) -> None:
    manifest = read(copied)
    manifest["precisions"]["int4"][key] = value
    write(copied, manifest)
    refused(llm_export(copied, "--explain"), "manifest.json", "int4")


def test_an_invalid_precision_name_is_an_error(copied: Path, llm_export: Run) -> None:
    manifest = read(copied)
    manifest["precisions"]["\x1b[2J"] = manifest["precisions"].pop("int4")
    write(copied, manifest)
    refused(llm_export(copied, "--explain"), "manifest.json", "name")


def test_a_file_that_is_not_a_manifest_is_an_error(copied: Path, llm_export: Run) -> None:
    (copied / "manifest.json").write_text("{", encoding="utf-8")
    refused(llm_export(copied, "--explain"), "manifest.json", "not JSON")

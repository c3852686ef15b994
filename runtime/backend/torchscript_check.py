"""`check_program`: inspects the code in a TorchScript archive and accepts only arithmetic on tensors.

TorchScript is a small language with Python's syntax. Some of its operators access files or arbitrary memory, and its
classes may have methods that run when they are loaded. A decoder needs none of these: everything outside the
allow-lists below is rejected. A file can then only compute, though possibly for a very long time.
"""

from __future__ import annotations

import ast
import pickletools
import zipfile
from pathlib import Path

from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.safe_io import MIB

_MAX_CODE_BYTES = MIB  # 80 layers need less; parsing takes up to a thousand times as much memory
_METHODS = {"forward", "empty_past"}
_FUNCTIONS = {"annotate", "int", "range", "getattr"}
_PRIMITIVES = {"NumToTensor", "device"}
_OPERATORS = {
    *("__and__", "__derive_index", "__or__", "__range_length", "add", "append", "arange", "bitwise_not", "cat"),
    *("clamp", "cumsum", "div", "embedding", "eq", "flatten", "floor_divide", "ge", "gelu", "gt", "index"),
    *("index_select", "layer_norm", "le", "len", "linear", "log", "masked_fill", "matmul", "max", "mul", "neg"),
    *("new_zeros", "relu", "reshape", "rms_norm", "scaled_dot_product_attention", "silu", "size", "slice", "softmax"),
    *("split_with_sizes", "square", "sub", "tanh", "to", "transpose", "unsqueeze"),
}
_NODES = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg),
    *(ast.Assign, ast.AnnAssign, ast.Expr, ast.For, ast.If, ast.Return),
    *(ast.Attribute, ast.Call, ast.Constant, ast.List, ast.Name, ast.Subscript, ast.Tuple, ast.UnaryOp, ast.keyword),
    *(ast.Load, ast.Store, ast.USub),
)
_STRUCTURE = {"data.pkl", "constants.pkl"}
_GLOBALS = {
    "collections OrderedDict",
    "torch DoubleStorage",
    "torch FloatStorage",
    "torch LongStorage",
    "torch._utils _rebuild_tensor_v2",
}
_AMBIGUOUS = b"#\\\r\f\v\0"  # where Python and TorchScript might be parsed differently
_OTHERS = {"version", "byteorder", ".data/version"}


def check_program(path: Path) -> None:
    """Check that a file contains only code that a decoder needs.

    Raises:
        BundleError: it is not an archive as the exporter writes it, or contains other code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if archive.comment or not records or min(record.header_offset for record in records) != 0:
                raise _refused(path, "has another layout than exported files")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _refused(path, "contains compressed records")
            # torch ignores case in record names and may use any of several with the same name, so all are checked.
            names = [record.filename.lower().partition("/")[2] for record in records]
            codes = [
                record
                for record, name in zip(records, names, strict=True)
                if not name.startswith(("data/", "constants/")) and name not in _OTHERS
            ]
            if sum(record.file_size for record in codes) > _MAX_CODE_BYTES:
                raise _refused(path, f"contains more than {_MAX_CODE_BYTES // MIB} MiB of code")
            for record in codes:
                name = record.filename.partition("/")[2]
                if name in _STRUCTURE:
                    _check_structure(path, archive.read(record))
                elif name.startswith("code/__torch__") and name.endswith(".py"):
                    _check_code(path, archive.read(record))
                else:
                    raise _refused(path, f"contains {name[:100]!r}")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RecursionError, ValueError) as error:
        raise BundleError(f"{path}: not a TorchScript archive ({error}): export the bundle again") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error}): export the bundle again") from error


def _check_code(path: Path, code: bytes) -> None:
    if not code.isascii() or any(sign in code for sign in _AMBIGUOUS):
        raise _refused(path, "contains code that torch would not write")
    try:
        tree = ast.parse(code.decode("ascii"))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise _refused(path, "contains code that cannot be parsed") from error
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise _refused(path, f"contains code with {type(node).__name__}")
        if isinstance(node, ast.FunctionDef) and node.name not in _METHODS:
            raise _refused(path, f"defines {node.name[:100]}")
        if isinstance(node, ast.Call) and not _is_known(node.func):
            raise _refused(path, f"calls {ast.unparse(node.func)[:100]}")


def _check_structure(path: Path, pickled: bytes) -> None:
    """Allow tensors and modules defined in the file; classes built into torch may do anything when restored."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            name = str(argument)  # module and class, separated by a space
            built_in = name.replace(" ", ".").startswith("__torch__.torch.classes.")
            if built_in or not (name in _GLOBALS or name.startswith("__torch__.")):
                raise _refused(path, f"refers to {name[:100]}")
        elif opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise _refused(path, "refers to classes in an unusual way")


def _is_known(function: ast.expr) -> bool:
    match function:
        case ast.Name(id=name):
            return name in _FUNCTIONS
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name in _OPERATORS
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="ops"), attr="prim"), attr=name):
            return name in _PRIMITIVES
        case ast.Attribute(attr="forward"):
            return True
    return False


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: it {what}, unlike an exported decoder: do not trust it, export the bundle again")

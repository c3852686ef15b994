"""A bundle's graph at work: token ids in, logits out, over a cache. Knows nothing of text or sampling.

onnxruntime's official builds report usage to their maker; importing this module turns that off.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the library starts
# Its tiled attention over several tokens is slower than the plain one; see bench/RESULTS.md.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

import contextlib
import functools
import io
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from llm_edge.runtime.backend import huge_pages, mapped_files
from llm_edge.runtime.backend.kv_cache import GrowingCache, KVCache, SharedCache
from llm_edge.runtime.bundle import TORCHSCRIPT, ModelShape
from llm_edge.runtime.errors import BundleError, ContextLengthError, MachineError, ParameterError, ProviderError

PROVIDERS = ("auto", "cpu", "cuda")
MAX_STEP_TOKENS = 512
"""Tokens a step takes at most, so that memory and the time to a cancel stay bounded."""
PREFILL_CHUNK = 256
"""Tokens of a prompt a step: what they make stays in the processor's caches; see bench/RESULTS.md."""
_PRODUCTS_LEFT = 1
"""Matrix products a layer that CUDA may leave to the CPU; with more of them `auto` takes the CPU for all."""

_EXECUTION: Mapping[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # TF32 would round the factors of fp32's products to 10 bits (bench/RESULTS.md).
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}
HIDDEN_STATES = "hidden_states"
NUM_HIDDEN_STATES = "num_hidden_states_to_keep"
_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),  # the graph holds the scales
}

if TYPE_CHECKING:
    from llm_edge.runtime.backend.torchscript_session import TorchScriptSession

Logits = npt.NDArray[np.float32]
HiddenStates = npt.NDArray[np.float32]
AnySession: TypeAlias = "Session | TorchScriptSession"


class Session:
    """One conversation's cache over one graph.

    Args:
        path: the `.onnx` file.
        shape: what the graph must look like.
        share_buffer: past and present may be one buffer.
        provider: `cpu`, `cuda`, or `auto`: CUDA where it works with this graph and has kernels for its products, else
            the CPU.
        threads: of onnxruntime inside an operator; None leaves it the physical cores.
        spinning: idle threads wait busily and weights go into large pages of memory: for a session that has the
            machine to itself.
        in_turns: another session makes steps between this one's, so idle threads wait busily during a step alone.
        hidden_size: H, width of the hidden states that the manifest promises; None where it promises none.

    Attributes:
        provider: `cpu` or `cuda`, whichever it came to be.
        length: tokens in the cache.
        run_seconds: time spent inside onnxruntime so far.
        graph: onnxruntime's session.
        cache_names: of the cache's tensors, without `past_key_values.` and `present.`.
        cache_dtype: their type.
        cache_device: `cpu` or `cuda`, where the graph reads them.
        has_hidden_states: the graph computes hidden states in every step, of as many positions as it is told to.

    Raises:
        BundleError: the graph does not load or is not of the shape the manifest says.
        ProviderError: CUDA was asked for and is not there, or cannot run this graph.
    """

    def __init__(
        self,
        path: Path,
        shape: ModelShape,
        share_buffer: bool,
        provider: str = "auto",
        threads: int | None = None,
        *,
        spinning: bool = True,
        in_turns: bool = False,
        hidden_size: int | None = None,
    ) -> None:
        self.shape = shape
        self._hidden_size = hidden_size
        self.provider = _choose_provider(provider)
        self.length = 0
        self.run_seconds = 0.0
        check_threads(threads)

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors reach the caller as exceptions
        options.enable_mem_pattern = False  # steps differ in length: patterns would pile up
        if threads is not None:
            options.intra_op_num_threads = threads
        # Threads take their share of an operator in smaller and smaller blocks; see bench/RESULTS.md.
        options.add_session_config_entry("session.dynamic_block_base", "16")
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if in_turns:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            try:
                self._start(path, share_buffer, options)
                if provider == "auto" and self._products_on_cpu() > _PRODUCTS_LEFT * shape.num_hidden_layers:
                    self.provider = "cpu"
                else:
                    self.step([0])  # an operator can be there and refuse what this graph asks of it
            except (BundleError, MachineError) as error:
                if provider == "cuda":
                    raise ProviderError(
                        f"provider cuda: {path} does not run there ({error}); use provider='cpu' or 'auto'"
                    ) from error
                self.provider = "cpu"
        if self.provider == "cpu":
            self._start(path, share_buffer, options)
            mapped_files.release(path.with_name(f"{path.name}_data"))
            if spinning:  # 0.2 s for 150 MB: beside the first steps, not before them
                threading.Thread(target=huge_pages.collapse_pages, name="llm-edge-huge-pages", daemon=True).start()
        self.length = 0
        self.run_seconds = 0.0

    def _start(self, path: Path, share_buffer: bool, options: ort.SessionOptions) -> None:
        """Load the graph on `self.provider`, with an empty cache."""
        try:
            # onnxruntime's own fallback prints on standard output.
            self.graph = ort.InferenceSession(
                path,
                options,
                providers=_EXECUTION[self.provider],
                enable_fallback=0,
                # It would copy a shared embedding; the fused graphs have nothing else to fold.
                disabled_optimizers=["ConstantFolding"] if share_buffer else [],
            )
        except MemoryError as error:
            raise MachineError(f"{path}: not enough memory to load it") from error
        except Exception as error:
            raise BundleError(f"{path}: onnxruntime cannot load it ({one_line(error)})") from error
        names = [f"{i}.{part}" for i in range(self.shape.num_hidden_layers) for part in ("key", "value")]
        dtype = self._cache_type(path, names)
        self.cache_names, self.cache_dtype = names, dtype
        device = self.cache_device = self._device_of(f"past_key_values.{names[0]}")
        heads, head_dim = self.shape.num_key_value_heads, self.shape.head_dim
        self._cache: KVCache = (
            SharedCache(names, heads, head_dim, dtype, device, self.shape.max_position_embeddings)
            if share_buffer
            else GrowingCache(names, heads, head_dim, dtype, device)
        )
        self._binding = self.graph.io_binding()
        # Small inputs live in these arrays. A GPU gets a copy when one is bound: whatever changes is bound again.
        self._ids = np.zeros(MAX_STEP_TOKENS, dtype=np.int64)
        self._mask = np.ones(self.shape.max_position_embeddings, dtype=np.int64)
        self._keep = np.zeros((), dtype=np.int64)
        self._keep_hidden = np.zeros((), dtype=np.int64)
        self._logits: Logits = np.zeros((1, self.shape.vocab_size), dtype=np.float32)
        self._bound: tuple[int, int] = (-1, -1)
        self._fetched = ""

    @property
    def limit(self) -> int:
        """Tokens the context holds at most."""
        return self.shape.max_position_embeddings

    def step(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_logits: int = 1) -> Logits:
        """Run new tokens over the cache and keep theirs in it.

        Args:
            tokens: 1 to `MAX_STEP_TOKENS` token ids.
            num_logits: logits of the last n of them; 0 gives all.

        Returns:
            logits [n, V]. The array is the session's own: the next step with as many logits overwrites it.

        Raises:
            ParameterError: too few or too many tokens, or logits of more positions than there are.
            ContextLengthError: they do not fit into the context any more.
        """
        new = len(tokens)
        check_step(new, self.length, num_logits, self.limit)
        self._fetch("logits")
        rows = num_logits or new
        if self._bound != (new, rows):
            self._keep[...] = num_logits
            if rows != len(self._logits):
                self._logits = np.zeros((rows, self.shape.vocab_size), dtype=np.float32)
            self._bind("num_logits_to_keep", self._keep, [])
            self._bind_logits()
            self._bound = (new, rows)
        self._run(tokens)
        return self._logits

    def hidden_states(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_states: int = 0) -> HiddenStates:
        """Run new tokens as `step` does, for what the last norm yields: transformers' `last_hidden_state`.

        Args:
            tokens: 1 to `MAX_STEP_TOKENS` token ids.
            num_states: hidden states of the last n of them; 0 gives all.

        Returns:
            hidden states [n, H].

        Raises:
            BundleError: the manifest promises none.
            ParameterError, ContextLengthError: as `step`.
        """
        if self._hidden_size is None:
            raise BundleError("the graph offers no hidden states: export it again with llm-export --hidden-states")
        new = len(tokens)
        check_step(new, self.length, num_states, self.limit)
        self._fetch(HIDDEN_STATES)
        self._keep_hidden[...] = num_states
        self._bind(NUM_HIDDEN_STATES, self._keep_hidden, [])
        states: HiddenStates = np.empty((num_states or new, self._hidden_size), dtype=np.float32)
        self._binding.bind_output(HIDDEN_STATES, "cpu", 0, np.float32, [1, *states.shape], states.ctypes.data)
        self._run(tokens)
        return states

    def _fetch(self, output: str) -> None:
        """Bind for steps that yield this one; the other is computed all the same, so of a single position."""
        if self._fetched == output:
            return
        self._binding.clear_binding_outputs()
        self._cache.unbound()
        self._bound = (-1, -1)
        self._keep[...] = self._keep_hidden[...] = 1
        self._bind("num_logits_to_keep", self._keep, [])
        if self.has_hidden_states:
            self._bind(NUM_HIDDEN_STATES, self._keep_hidden, [])
        self._fetched = output

    def _run(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """A step; everything but tokens and cache is bound."""
        new, past = len(tokens), self.length
        self._ids[:new] = tokens
        self._bind("input_ids", self._ids, [1, new])
        self._bind("attention_mask", self._mask, [1, past + new])
        try:
            self._cache.bind(self._binding, past, new)
            began = time.perf_counter()
            self.graph.run_with_iobinding(self._binding)
            self.run_seconds += time.perf_counter() - began
        except MemoryError as error:
            raise MachineError(f"not enough memory for a step over {new} tokens behind {past}") from error
        except Exception as error:
            raise MachineError(f"a step over {new} tokens behind {past} failed ({one_line(error)})") from error
        self._cache.advance(self._binding)
        self.length = past + new

    def cache_zeros(self, shape: tuple[int, ...]) -> Any:
        """A value of onnxruntime's, of the cache's type and where the graph reads the cache."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.cache_dtype), self.cache_device, 0)

    @staticmethod
    def run_options() -> Any:
        """onnxruntime's own for a step, with which another thread can end it."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "0")  # the default; a step that has to find that out takes 80 us
        return options

    @property
    def rewinds(self) -> bool:
        """Whether `rewind` costs nothing."""
        return isinstance(self._cache, SharedCache)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first ones; buffers stay."""
        self._cache.rewind(length)
        self.length = length

    def reset(self) -> None:
        """Forget the conversation; buffers stay."""
        self.rewind(0)

    def _bind(self, name: str, array: npt.NDArray[Any], shape: list[int]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _bind_logits(self) -> None:
        rows, width = self._logits.shape
        self._binding.bind_output("logits", "cpu", 0, np.float32, [1, rows, width], self._logits.ctypes.data)

    def _device_of(self, name: str) -> str:
        """Where the graph reads an input; also on a GPU this is the CPU if the operator has no kernel for the type.

        A cache anywhere else would be copied when it is bound, and the steps written in place would be lost.
        """
        names = [node.name for node in self.graph.get_inputs()]
        memory = self.graph.get_input_memory_infos()[names.index(name)]
        return "cuda" if memory.name == "Cuda" else "cpu"

    def _products_on_cpu(self) -> int:
        """Matrix products that have no kernel on CUDA for their types; each of them costs copies there and back."""
        parts = self.graph.get_provider_graph_assignment_info()
        nodes = [node.op_type for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
        return sum("MatMul" in kind or kind == "Gemm" for kind in nodes)

    def _cache_type(self, path: Path, names: list[str]) -> np.dtype[Any]:
        """Type of the cache; the graph must have the inputs and outputs that the manifest promises."""
        inputs = {node.name: node for node in self.graph.get_inputs()}
        wanted = {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)}
        outputs = {node.name: node for node in self.graph.get_outputs()}
        optional = {node.name for node in self.graph.get_overridable_initializers()}
        hidden = outputs.pop(HIDDEN_STATES, None)
        self.has_hidden_states = hidden is not None
        if (
            not optional >= {"num_logits_to_keep", *([NUM_HIDDEN_STATES] if self.has_hidden_states else [])}
            or inputs.keys() != wanted
            or outputs.keys() != {"logits", *(f"present.{name}" for name in names)}
        ):
            raise BundleError(f"{path}: the graph's inputs and outputs are not those of a decoder with a cache")
        shape = [*self.graph.get_outputs()[0].shape]
        if shape[-1] != self.shape.vocab_size:
            raise BundleError(f"{path}: the graph's vocabulary is {shape[-1]}, not {self.shape.vocab_size}")
        promised = self._hidden_size
        if promised and (hidden is None or (hidden.type, hidden.shape[-1]) != ("tensor(float)", promised)):
            raise BundleError(
                f"{path}: the graph has no hidden states of {promised}, the manifest says otherwise: "
                "export the bundle again"
            )
        cache = inputs[f"past_key_values.{names[0]}"]
        if cache.type not in _TYPES:
            raise BundleError(f"{path}: a cache of type {cache.type} is not supported")
        if [cache.shape[1], cache.shape[3]] != [self.shape.num_key_value_heads, self.shape.head_dim]:
            raise BundleError(f"{path}: the graph's cache is {cache.shape}, the manifest says otherwise")
        return _TYPES[cache.type]


def open_session(
    path: Path,
    shape: ModelShape,
    file_format: str,
    share_buffer: bool,
    provider: str = "auto",
    threads: int | None = None,
    *,
    spinning: bool = True,
    in_turns: bool = False,
    hidden_size: int | None = None,
) -> AnySession:
    """The session for a file of this format, one of `bundle.FORMATS`; see `Session` and `TorchScriptSession`."""
    if file_format == TORCHSCRIPT:
        from llm_edge.runtime.backend.torchscript_session import TorchScriptSession

        return TorchScriptSession(path, shape, provider, threads)
    return Session(
        path, shape, share_buffer, provider, threads, spinning=spinning, in_turns=in_turns, hidden_size=hidden_size
    )


def tries_cuda(provider: str) -> bool:
    """Whether a session of this provider begins with CUDA."""
    return provider != "cpu" and _cuda_problem() is None


def check_provider(provider: str) -> None:
    """Refuse what is no provider."""
    if provider not in PROVIDERS:
        raise ParameterError(f"provider is {provider!r}; {', '.join(PROVIDERS)} are possible")


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that nobody can mean."""
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise ParameterError(f"threads is {threads!r}; 1 to 1024 are possible")


def check_step(new: int, past: int, num_logits: int, limit: int) -> None:
    """Refuse a step that cannot be made; see `Session.step`."""
    if not 1 <= new <= MAX_STEP_TOKENS:
        raise ParameterError(f"a step takes 1 to {MAX_STEP_TOKENS} tokens, not {new}")
    if not 0 <= num_logits <= new:
        raise ParameterError(f"num_logits is {num_logits}; a step over {new} tokens has 0 (all) to {new}")
    if past + new > limit:
        raise ContextLengthError(past + new, limit)


def _choose_provider(provider: str) -> str:
    check_provider(provider)
    problem = None if provider == "cpu" else _cuda_problem()
    if provider == "cuda" and problem is not None:
        raise ProviderError(f"provider cuda: {problem} or use provider='cpu'")
    return "cpu" if provider == "cpu" or problem is not None else "cuda"


@functools.cache
def _cuda_problem() -> str | None:
    """What keeps CUDA from starting in this process and what helps, or None."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return (
            "this onnxruntime has no CUDA; pip uninstall -y onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    said = io.StringIO()
    ort.set_default_logger_severity(4)  # what goes wrong is told once, as an exception
    try:
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()  # those of CUDA and cuDNN that are Python packages; it prints what it misses
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype=np.float32), "cuda", 0)
    except Exception as error:  # noqa: BLE001 (onnxruntime has no base class for its errors)
        text = " ".join(f"{said.getvalue()} {error}".split())
        known = re.search(r"Failed to load (\S+?): |CUDA failure \d+: ([^;]*[^; ])", text)
        reason = "no driver, or libraries of another version"
        if known is not None:
            reason = known[2] or f"{known[1]} is missing"
        return f"onnxruntime cannot start it here ({reason[:200]}); mend that"
    finally:
        ort.set_default_logger_severity(2)  # the library's own default; it does not tell what was set
    return None


def one_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:300]

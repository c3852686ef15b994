"""Execution providers: which there are, and whether CUDA works in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import re

import numpy as np
import onnxruntime as ort

from llm_edge.runtime.errors import ParameterError, ProviderError

PROVIDERS = ("auto", "cpu", "cuda")


def check_provider(provider: str) -> None:
    """Raise ParameterError for anything but `auto`, `cpu` and `cuda`."""
    if provider not in PROVIDERS:
        raise ParameterError(f"provider is {provider!r}; use one of {', '.join(PROVIDERS)}")


def check_threads(threads: int | None) -> None:
    """Raise ParameterError for anything but None and 1 to 1024."""
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise ParameterError(f"threads is {threads!r}; use 1 to 1024")


def resolve_provider(provider: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where it works.

    Raises:
        ProviderError: CUDA was requested and does not work here; the message says why and what helps.
    """
    check_provider(provider)
    problem = None if provider == "cpu" else _cuda_problem()
    if provider == "cuda" and problem is not None:
        raise ProviderError(f"provider cuda: {problem} or use provider='cpu'")
    return "cpu" if provider == "cpu" or problem is not None else "cuda"


def cuda_works() -> bool:
    """Whether onnxruntime can use CUDA in this process."""
    return _cuda_problem() is None


@functools.cache
def _cuda_problem() -> str | None:
    """Why CUDA does not work in this process and what helps; None if it works."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return (
            "this onnxruntime has no CUDA; pip uninstall -y onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    output = io.StringIO()
    ort.set_default_logger_severity(4)  # the problem is reported once, as an exception
    try:
        with contextlib.redirect_stdout(output):
            ort.preload_dlls()  # from the CUDA and cuDNN packages of PyPI; it prints what it does not find
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype=np.float32), "cuda", 0)
    except Exception as error:  # noqa: BLE001 (onnxruntime has no base class for its errors)
        text = " ".join(f"{output.getvalue()} {error}".split())
        known = re.search(r"Failed to load (\S+?): |CUDA failure \d+: ([^;]*[^; ])", text)
        reason = "no driver, or libraries of another version"
        if known is not None:
            reason = known[2] or f"{known[1]} is missing"
        return f"onnxruntime cannot start it here ({reason[:200]}); fix that"
    finally:
        ort.set_default_logger_severity(2)  # the library's default; the current value cannot be queried
    return None

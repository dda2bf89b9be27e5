"""Chooses onnxruntime's execution provider: where exported models compute.

The first that the installed onnxruntime offers and that loads is taken: an NVIDIA GPU, OpenVINO, the CPU. `--provider`
demands one; so does FLAWSMITH_PROVIDER, for commands without that option. Where neither does, FLAWSMITH_DEVICE=cpu
keeps this off a GPU too. FLAWSMITH_DEVICE=cuda is a demand on torch alone: who trains on a GPU need not have
onnxruntime-gpu.
"""

import contextlib
import io
import logging
import os
from functools import cache
from importlib.metadata import version
from typing import Any

import onnxruntime

from flawsmith.errors import UserError

AUTO, CPU = "auto", "cpu"
VARIABLE, DEVICE_VARIABLE = "FLAWSMITH_PROVIDER", "FLAWSMITH_DEVICE"
NAMES = {
    CPU: "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
CHOICES = (AUTO, *NAMES)
# TensorRT only if it is demanded: it builds an engine for each shape that it meets, and the first images wait minutes.
_BY_ITSELF = ("cuda", "openvino")
_PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
# The threshold was chosen on float32 answers, so none of them may round more coarsely (TF32 on a GPU, bfloat16 or
# float16 in OpenVINO); and an algorithm chosen by a race would answer differently from run to run.
_OPTIONS: dict[str, dict[str, str]] = {
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
    "openvino": {"precision": "ACCURACY"},
}
SILENT = 4  # onnxruntime's severity "fatal": what it would log is raised, or said here in one sentence

log = logging.getLogger(__name__)


def offered() -> list[str]:
    """List the providers that the installed onnxruntime was built with, by our names. Not all of them need to load."""
    found = onnxruntime.get_available_providers()
    return [name for name, theirs in NAMES.items() if theirs in found]


def demanded(provider: str | None = None) -> str:
    """Return what is asked for, one of CHOICES: by `provider`, else FLAWSMITH_PROVIDER, else FLAWSMITH_DEVICE=cpu.

    Raises:
        UserError: there is no such provider, or the installed onnxruntime lacks it.
    """
    asked, told_by = provider or "", "--provider"
    if not asked:
        asked, told_by = os.environ.get(VARIABLE) or AUTO, VARIABLE
    if asked == AUTO and os.environ.get(DEVICE_VARIABLE) == CPU:
        return CPU
    if asked not in CHOICES:
        raise UserError(f"{told_by} is `{asked}`; it must be one of {', '.join(CHOICES)}.")
    if asked != AUTO and asked not in offered():
        raise UserError(
            f"{told_by} is {asked}, but onnxruntime has only {', '.join(offered())} here; `pip uninstall "
            f"{onnxruntime.package_name}`, then `pip install {_PACKAGES[asked]}`, or set {VARIABLE} to another."
        )
    return asked


def open_session(model: str | bytes, options: Any, provider: str | None = None) -> tuple[Any, str]:
    """Open an onnxruntime session of a model; returns it and the provider that it really computes on.

    Args:
        model: the path of an ONNX file, or its bytes.
        options: an onnxruntime.SessionOptions.
        provider: one of CHOICES; None: see `demanded`.

    Raises:
        UserError: the provider that is demanded is unknown, not installed, or does not load.
        Exception: the model cannot be loaded, whatever the provider; onnxruntime has a class for each reason.
    """
    asked = demanded(provider)
    for name in [name for name in (_BY_ITSELF if asked == AUTO else (asked,)) if name != CPU and name in offered()]:
        try:
            session = _open(model, options, name)
        except Exception as error:
            trouble = f": {' '.join(str(error).split())[:300]}"
        else:
            if session.get_providers()[0] == NAMES[name]:
                return session, name
            # onnxruntime then computes on the CPU, and says nothing
            trouble = " (its libraries, its driver or its device are missing)"
        session = _open(model, options, CPU)  # raises if it was the model's fault
        sentence = f"onnxruntime offers {name} here, but it does not load{trouble}"
        if asked != AUTO:
            raise UserError(f"{sentence}; mend that, or choose another with --provider or {VARIABLE}.")
        _warn(f"{sentence}; going on without it.")
    return _open(model, options, CPU), CPU


def package_version(name: str) -> str:
    """Return the version of an installed package. onnxruntime is asked itself: its GPU builds have other names."""
    return str(onnxruntime.__version__) if name == "onnxruntime" else version(name)


def _open(model: str | bytes, options: Any, name: str) -> Any:
    if name != CPU:
        onnxruntime.set_default_logger_severity(SILENT)
    if name in ("cuda", "tensorrt"):
        options.use_deterministic_compute = True
        _load_cuda()
    own = dict(_OPTIONS.get(name, {}))
    if name == "openvino" and options.intra_op_num_threads:
        own["num_of_threads"] = str(options.intra_op_num_threads)
    # the providers behind it take the operations that it lacks
    behind = {CPU: [], "tensorrt": ["cuda", CPU]}.get(name, [CPU])
    providers = [(NAMES[name], own), *((NAMES[other], _OPTIONS.get(other, {})) for other in behind)]
    return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)


@cache
def _load_cuda() -> None:
    """Find CUDA's libraries where pip put them (torch brings them), without importing torch."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()


@cache
def _warn(sentence: str) -> None:
    """Once a process: it opens many sessions."""
    log.warning("%s", sentence)

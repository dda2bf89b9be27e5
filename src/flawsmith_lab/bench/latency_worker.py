"""One ONNX model in a process of its own, timed: `bench.latency` starts it, for every model alike.

    python -P latency_worker.py RUNTIME MODEL SIZE BATCH THREADS RUNS LIMIT

RUNTIME is onnxruntime or openvino; of flawsmith nothing is imported, since OpenVINO lies in anomalib's environment.
After one run to warm up come RUNS runs, fewer where LIMIT seconds are over before; none where the first run took that
long. The answer is a line of JSON: `warm_up` and `seconds` of every run, and `peak_mb`, the most memory in MiB.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.float32]], None]
_SILENT = 4  # onnxruntime's severity "fatal": errors are raised as exceptions anyway


def open_onnxruntime(model: str, threads: int) -> Run:
    """All outputs, on the CPU; no second pool of threads beside the one for a single operation."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def open_openvino(model: str, threads: int) -> Run:
    """The same file in OpenVINO; fp32 stays fp32 on machines where it would choose bfloat16."""
    core = import_module("openvino").Core()
    options = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"
    }  # fmt: skip
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)


def peak_mb() -> float:
    """Peak of resident memory. Not `ru_maxrss` on Linux: that begins at what the parent had when it forked."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:  # no Linux
        pass
    import resource  # not where there is no POSIX

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def seconds_of(run: Run, images: NDArray[np.float32]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def main(runtime: str, model: str, numbers: list[str]) -> None:
    """Time the model and print the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    (size, batch, threads, runs), limit = map(int, numbers[:4]), float(numbers[4])
    run = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[runtime](model, threads)
    images = np.random.default_rng(0).random((batch, 3, size, size), np.float32)
    warm_up = seconds_of(run, images)
    taken: list[float] = []
    while warm_up < limit and len(taken) < runs and sum(taken) < limit:
        taken.append(seconds_of(run, images))
    print(json.dumps({"warm_up": warm_up, "seconds": taken, "peak_mb": peak_mb()}), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

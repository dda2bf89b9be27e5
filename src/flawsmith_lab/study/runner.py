"""One stage run in its own process, so that its memory can be measured: `python -m flawsmith_lab.study.runner TASK`.

The process holds the run's lock for as long as it lives, so whoever else wants the same run leaves it alone, however
the study that started it ends. Exit status: 0 done (or was done already), 1 failed (failed.json says why), 75 another
process has it.
"""

import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flawsmith.errors import FlawsmithError
from flawsmith.files import digest_path, read_json, write_json
from flawsmith.settings import parse_settings
from flawsmith_lab.study.plan import KNN, code_digest
from flawsmith_lab.study.store import StoredLayout

BUSY = 75  # EX_TEMPFAIL of sysexits.h
MEGABYTE = 2**20


def main(path: Path) -> int:
    """Run the task written down in `path`."""
    started = time.monotonic()
    _end_with_parent()
    base = path.name.removesuffix(".task.json")
    beside = {name: path.with_name(f"{base}.{name}") for name in ("lock", "cost.json", "failed.json", "attempt.json")}
    try:
        with FileLock(beside["lock"], timeout=0):
            if beside["cost.json"].is_file() and path.with_name(base).is_dir():
                return 0
            beside["failed.json"].unlink(missing_ok=True)
            earlier = _earlier_attempts(beside["attempt.json"], path.with_name(f"{base}.resume"))
            write_json(beside["attempt.json"], earlier | {"began": time.time()})
            try:
                _run_stage(read_json(path))
            except Exception as error:
                if not isinstance(error, FlawsmithError):
                    traceback.print_exc()
                reason = " ".join(str(error).split()) or "no reason given"
                write_json(beside["failed.json"], {"kind": type(error).__name__, "reason": reason})
                return 1
            cost = _measure(earlier["seconds"] + time.monotonic() - started)
            write_json(
                beside["cost.json"],
                cost | {"attempts": earlier["attempts"], "output": digest_path(path.with_name(base))},
            )
            beside["attempt.json"].unlink(missing_ok=True)
            return 0
    except Timeout:
        return BUSY


def _run_stage(task: dict[str, Any]) -> None:
    """Call the stage's own function on the store's folders.

    Raises:
        FlawsmithError: the source files are no longer those of the plan: the digest would lie.
    """
    layout = StoredLayout(
        parse_settings(task["settings"], "the study's settings"),
        task["category"],
        Path(task["root"]),
        {name: Path(folder) for name, folder in task["folders"].items()},
    )
    stage = task["stage"]
    module = import_module("flawsmith.stages." + ("evaluate" if stage == KNN else stage.replace("-", "_")))
    # after the import, so that what was digested is what runs
    if code_digest(task["code"]) != task["code_digest"]:
        raise FlawsmithError(
            f"The source files of stage `{stage}` have changed since this study began; start it again."
        )
    (module.run_baseline if stage == KNN else module.run)(layout)


def _earlier_attempts(record: Path, resume: Path) -> dict[str, Any]:
    """Of attempts that were killed: their number, counting this one, and the seconds whose work a checkpoint keeps.

    Work that was lost is not counted: the cost is that of a run that never stopped.
    """
    if not record.is_file():
        return {"attempts": 1, "seconds": 0.0}
    last = read_json(record)
    try:
        saved = (resume / "checkpoint.pt").stat().st_mtime
    except FileNotFoundError:
        kept = 0.0
    else:
        kept = last["seconds"] + max(0.0, saved - last["began"])
    return {"attempts": last["attempts"] + 1, "seconds": kept}


def _measure(seconds: float) -> dict[str, Any]:
    """Seconds of the process, imports included, and its peak of memory in MiB, of the device's too if it used one.

    Not the `ru_maxrss` that a parent gets from wait4: on Linux that begins at what the parent had when it forked.
    """
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "seconds": round(seconds, 3),
        "peak_mb": round(_peak_bytes() / MEGABYTE, 1),
        "peak_device_mb": round(torch.cuda.max_memory_reserved() / MEGABYTE, 1) if torch and cuda else None,
        "device": torch.cuda.get_device_name() if torch and cuda else "cpu",
        "threads": torch.get_num_threads() if torch else None,
    }


def _peak_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # no Linux
        pass
    import resource  # not where there is no POSIX

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_with_parent() -> None:
    """Die when the study does, even by SIGKILL: the kernel then closes the other end of our stdin."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

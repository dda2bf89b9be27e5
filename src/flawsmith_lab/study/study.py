"""A study from request to report.

Each stage runs in a process of its own, so that its memory can be measured. What lies in OUT/store is done and is not
computed again, so a study that was killed goes on where it stood.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flawsmith.errors import FlawsmithError
from flawsmith.files import digest_path, write_json
from flawsmith.git import git_state
from flawsmith.progress import Bar, bar
from flawsmith_lab.bench.latency_worker import peak_mb
from flawsmith_lab.study.plan import PATCHCORE, Cell, Plan, Request, StageRun, build_plan, code_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a study ended: cells in all, cells without a result, and the report."""

    cells: int
    failed: int
    report: Path


def run_study(request: Request, workers: int, command: str) -> Outcome:
    """Compute what is not computed yet; write results.json, results.parquet, report.md, report.html and curves/.

    The results are of this request alone; what other requests computed stays in OUT/store and is used again. They are
    written anew whenever a cell ends, the report once at the end.

    Raises:
        UserError: the request cannot be planned.
    """
    plan = build_plan(request)
    commit, changed = git_state(plan.root)

    from flawsmith_lab.study.report import About, write_report  # pandas and matplotlib, not before the plan stands
    from flawsmith_lab.study.results import collect_rows, write_results

    failures: dict[Path, str] = {}
    compute_cells(
        plan, workers, failures, lambda: write_results(request.out, collect_rows(plan, failures), commit, changed)
    )
    rows = collect_rows(plan, failures)
    write_results(request.out, rows, commit, changed)
    write_report(request.out, rows, About(command, commit, changed, plan.reference, request.seeds, request.grid))
    failed = [row for row in rows if not row.is_done]
    for row in failed:
        log.warning("%s, %s, seed %d: %s failed: %s", row.cell.category, row.cell.label, row.cell.seed,
                    row.failed_stage, row.failure)  # fmt: skip
    return Outcome(len(rows), len(failed), request.out / "report.html")


def compute_cells(plan: Plan, workers: int, failures: dict[Path, str], on_cell: Callable[[], None]) -> None:
    """Run every stage run that is not done yet, up to `workers` at once, and call `on_cell` after each cell.

    `failures` gets the reason of each run that failed, by its folder. What comes after a failed run is not tried; the
    next call of the study tries it again.
    """
    if workers > 1:  # or each stage would take every core
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    locks = {run.folder: threading.Lock() for run in plan.runs}
    done = {run.folder for run in plan.runs if run.is_done}
    log.info("%d cells, %d stage runs, %d of them done already", len(plan.cells), len(plan.runs), len(done))

    def compute(cell: Cell) -> None:
        for run in cell.runs:
            with locks[run.folder]:  # a run that another cell computes now is waited for
                if run.folder not in done and run.folder not in failures:
                    compute_run(run)
            if run.folder in failures:
                return

    def compute_run(run: StageRun) -> None:
        began = time.monotonic()
        cost = run_in_process(run)
        if isinstance(cost, str):
            failures[run.folder] = cost
            log.warning("%s: %s failed: %s", run.layout.category, run.stage, cost)
            return
        seconds = round(time.monotonic() - began, 3)
        write_json(run.folder.with_suffix(".json"), {**cost, "seconds": seconds})
        done.add(run.folder)
        progress.update()
        log.info("[%d/%d] %s: %s, %.1f s", len(done), len(plan.runs), run.layout.category, run.stage, seconds)

    progress: Bar[None] = bar(what="study", total=len(plan.runs), unit="stage", done=len(done), leave=False)
    with progress, ThreadPoolExecutor(workers) as pool:
        try:
            for cell in as_completed([pool.submit(compute, cell) for cell in plan.cells]):
                cell.result()
                on_cell()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def run_in_process(run: StageRun) -> dict[str, Any] | str:
    """Run a stage in a process of its own; return what it cost, or why it failed."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_execute, run).result()
    except BrokenProcessPool:
        return f"its process was killed, mostly for want of memory; see {run.folder.with_suffix('.log')}"


def _execute(run: StageRun) -> dict[str, Any] | str:
    """Run a stage in this process, all that it says going to a log beside its folder."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.folder.with_suffix(".log").open("ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        return perform(run)
    except Exception as error:
        if not isinstance(error, FlawsmithError):
            traceback.print_exc()
        return " ".join(str(error).split()) or f"{type(error).__name__} without a reason"


def perform(run: StageRun) -> dict[str, Any]:
    """Call the stage's own function; return memory, device, and the digest of what it left.

    Raises:
        FlawsmithError: the source files are no longer those of the plan: the digest would lie. Or as the stage.
    """
    resumed = run.layout.resume(run.stage).exists()
    module = import_module(
        "flawsmith.stages." + ("evaluate" if run.stage == PATCHCORE else run.stage.replace("-", "_"))
    )
    if code_digest() != run.code:  # after the import, so that what was digested is what runs
        raise FlawsmithError("The source files have changed since this study began; start it again.")
    (module.run_baseline if run.stage == PATCHCORE else module.run)(run.layout)
    return {**measure(), "resumed": resumed, "output": digest_path(run.folder)}


def measure() -> dict[str, Any]:
    """Peak memory of this process in MiB, of the device's too if it used one, and what it computed on."""
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "peak_mb": peak_mb(),
        "peak_device_mb": round(torch.cuda.max_memory_reserved() / 2**20, 1) if torch and cuda else None,
        "device": torch.cuda.get_device_name() if torch and cuda else "cpu",
        "threads": torch.get_num_threads() if torch else None,
    }


def _end_with_parent() -> None:
    """Die when the study does, even by SIGKILL: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

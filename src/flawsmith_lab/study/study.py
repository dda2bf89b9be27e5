"""A study from request to report; the shell around plan, worker, results and report."""

import logging
from dataclasses import dataclass
from pathlib import Path

from flawsmith.tracking import git_state
from flawsmith_lab.study.plan import Request, Task, build_plan
from flawsmith_lab.study.store import Store
from flawsmith_lab.study.worker import run_tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a study ended: cells in all and cells without a result."""

    cells: int
    failed: int
    report: Path


def run_study(request: Request, out: Path, workers: int, command: str) -> Outcome:
    """Compute what is not computed yet and write results.json, results.parquet, report.md, report.html, curves/.

    The results are of this request alone; what other requests computed stays in OUT/store and is used again. They are
    written anew whenever an evaluation ends, the report once at the end.

    Raises:
        UserError: the request cannot be planned.
    """
    plan = build_plan(request)
    store = Store(out.resolve() / "store")
    ready = sum(store.is_done(task) for task in plan.tasks)
    log.info("%d cells, %d stage runs, %d of them done already", len(plan.cells), len(plan.tasks), ready)
    commit, changed = git_state(plan.root)
    last = {cell.tasks[-1].key for cell in plan.cells}

    def save_rows(task: Task) -> None:
        if task.key in last:
            from flawsmith_lab.study.results import collect_rows, write_results

            write_results(out, collect_rows(plan, store, {}), commit, changed)

    failures = run_tasks(plan.tasks, store, plan.root, workers, save_rows)

    from flawsmith_lab.study.report import About, write_report  # matplotlib and pandas, not before there is something
    from flawsmith_lab.study.results import collect_rows, write_results

    rows = collect_rows(plan, store, failures)
    write_results(out, rows, commit, changed)
    write_report(out, rows, About(command, commit, changed, plan.reference, request.seeds, request.grid))
    failed = [row for row in rows if not row.is_done]
    for row in failed:
        log.warning("%s, %s, seed %d: %s failed: %s", row.cell.category, row.cell.label, row.cell.seed,
                    row.failed_stage, row.failure)  # fmt: skip
    return Outcome(len(rows), len(failed), out / "report.html")

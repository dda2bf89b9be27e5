"""The front door: `flawsmith --help`. A command a stage, and a few for what lies around them.

Nothing heavy is imported before a command needs it: help answers at once, and `predict` runs where torch is missing.
Exit status: 0 done, 1 failed (or a quality gate said no), 2 the input cannot be used as it is, 3 found what was looked
for (a defect, a drift), 130 interrupted.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flawsmith import __version__
from flawsmith.errors import FlawsmithError, UserError, refusal
from flawsmith.processes import is_main_process, world_size

if TYPE_CHECKING:
    from flawsmith.layout import Layout
    from flawsmith.settings import Settings

DEBUG = "FLAWSMITH_DEBUG"
INTERRUPTED = 130  # 128 + SIGINT, as shells do
LONGEST_REASON = 400  # characters of an unexpected error that are shown; torch writes pages

STAGES: dict[str, str] = {
    "ddpm-train": "Learn how the normal surface looks: a diffusion model of train/good.",
    "synthesize": "Make triplets (normal, defect, mask) with the disturbed reverse process.",
    "validate": "The quality gate: measure every triplet, write Data Docs, stop if a critical bound is broken.",
    "distill": "Train the student against the frozen teacher, then the heads that read where the two disagree.",
    "evaluate": "Score the labelled test set, set the threshold, write metrics, figures and report.html.",
    "export": "Write model.onnx and prove that it decides as the trained detector does.",
}
STAGE_PANEL = "Pipeline stages, in order (`dvc repro` runs what has changed)"
REGISTRY_PANEL = "Registry: which model is in use, and why"
USE_PANEL = "Use and understand a model"
STUDY_PANEL = "Find out what is worth its cost"
HOUSE_PANEL = "Around it"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learn to find surface defects from good parts alone.\n\n"
    "[bold]Whole pipeline[/bold], from the project's folder: [cyan]make repro[/cyan] (or [cyan]dvc repro[/cyan])\n\n"
    "[bold]Your own parts[/bold]: put defect-free images into data/CATEGORY/train/good, "
    "[cyan]dvc add data/CATEGORY[/cyan], name CATEGORY under `categories` in params.yaml, [cyan]dvc repro[/cyan]\n\n"
    "[bold]Use the model[/bold]: "
    "[cyan]flawsmith predict artifacts/CATEGORY/export/model.onnx FOLDER --out results[/cyan]",
)

ParamsOption = Annotated[
    Path, typer.Option("--params", metavar="PATH", help="The parameters; paths are relative to where this file lies.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Replace a value for this call alone (DVC does not see it), e.g. distill.batch=4. Repeatable.",
    ),
]
CategoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--category", "-c", metavar="NAME", help="Folder under data.root. Repeatable. Default: all of params."
    ),
]
OneCategoryOption = Annotated[
    str | None,
    typer.Option("--category", "-c", metavar="NAME", help="Folder under data.root. Default: the only one in params."),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the model computes: auto, cpu, cuda, tensorrt or openvino. Default: FLAWSMITH_PROVIDER, else the "
        "first of cuda, openvino and cpu that loads.",
    ),
]
DEFAULT_PARAMS = Path("params.yaml")


def main() -> None:
    """Run the command line; whatever goes wrong ends in one sentence on stderr and an exit status."""
    try:
        try:
            app(prog_name="flawsmith")
        finally:
            _flush()
    except FlawsmithError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted.", INTERRUPTED)
    except Exception as error:
        from flawsmith.extras import explain

        if refused := refusal(error) or explain(error):
            _fail(str(refused), refused.exit_code)
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        _fail(
            f"unexpected {type(error).__name__}{f': {shown}' if shown else ''} "
            f"(set {DEBUG}=1 to see where it happened).",
            FlawsmithError.exit_code,
        )


def _flush() -> None:
    """What is still to be printed is written now, where an error can be told."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again at its end
        raise


def _fail(sentence: str, exit_code: int) -> NoReturn:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    print("flawsmith: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _front(
    _version: Annotated[  # eager: answered before a missing command is complained of
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    logger = logging.getLogger("flawsmith")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


@app.command("demo-data", rich_help_panel=STAGE_PANEL)
def demo_data(
    surface: Annotated[
        list[str] | None,
        typer.Option("--surface", metavar="NAME", help="brushed_metal or woven_fabric. Default: those in params."),
    ] = None,
    if_category: Annotated[
        bool,
        typer.Option("--if-category", help="Only if it is one of `categories`, else an empty folder (as DVC asks)."),
    ] = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Render the embedded surfaces into data/SURFACE: normal images and a labelled test set."""
    from flawsmith.demo.render import KINDS

    settings = _settings(params, parse_overrides(overrides or []))
    names = surface or [name for name in settings.categories if name in KINDS]
    if not names:
        raise UserError(
            f"{params}: `categories` names no embedded surface ({', '.join(KINDS)}); name one with --surface."
        )
    run = import_module("flawsmith.stages.demo_data").run
    for name in dict.fromkeys(names):
        run(settings, params.parent, name, if_category)


def _add_stage(name: str, meaning: str) -> None:
    def stage(
        category: CategoryOption = None, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None
    ) -> None:
        layouts = _layouts(params, category, overrides)
        if world_size() > 1 and name != "ddpm-train":
            raise UserError(f"Several processes can share ddpm-train alone; run `flawsmith {name}` without a launcher.")
        run = import_module(f"flawsmith.stages.{name.replace('-', '_')}").run
        from flawsmith.progress import stage as shown

        place = list(STAGES).index(name) + 1, len(STAGES)
        for layout in layouts:
            with shown(name, layout.category, place, is_main_process()):
                run(layout)

    app.command(name, help=meaning, rich_help_panel=STAGE_PANEL)(stage)


for _name, _meaning in STAGES.items():
    _add_stage(_name, _meaning)


@app.command(rich_help_panel=USE_PANEL)
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx of the export stage.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT...]",
            help="Images, folders (searched recursively), patterns ('parts/**/*.png'), videos; or - alone: one path a "
            "line on standard input, scored as the lines come.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder for the results; replaced as a whole. -: JSON lines on standard output instead.",
        ),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option("--watch", metavar="DIR", help="Instead of INPUT: score images as they arrive there, once each."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="Flag an image whose score lies above this. Default: the model's own."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="A,B", help="Of csv, json, jsonl. Default: csv,json. --watch always writes jsonl."
        ),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option("--jsonl", metavar="FILE", help="JSON lines there, each as soon as it is known; -: stdout."),
    ] = None,
    overlays: Annotated[bool, typer.Option(help="Draw heat maps over the images.")] = True,
    masks: Annotated[
        bool, typer.Option("--masks", help="PNG masks (0, 255) of the regions of defective images.")
    ] = False,
    every: Annotated[int, typer.Option(metavar="K", help="Of a video, score each K-th frame.", min=1)] = 1,
    batch: Annotated[int, typer.Option(metavar="N", help="Images scored together.", min=1)] = 8,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Threads that decode images while the model works.", min=1)
    ] = 2,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads. Default: one a physical core.", min=1)
    ] = None,
    provider: ProviderOption = None,
    max_megapixels: Annotated[float, typer.Option(metavar="X", help="Larger images are refused.", min=0.01)] = 100.0,
    poll: Annotated[float, typer.Option(metavar="S", help="Seconds between looks of --watch.", min=0.01)] = 0.5,
    watch_for: Annotated[
        float | None, typer.Option("--watch-for", metavar="S", help="End --watch after S seconds.", min=0)
    ] = None,
    watch_idle: Annotated[
        float | None, typer.Option("--watch-idle", metavar="S", help="End --watch when nothing came for S.", min=0)
    ] = None,
    fail_on_defect: Annotated[bool, typer.Option("--fail-on-defect", help="Exit 3 if any image is defective.")] = False,
) -> None:
    """Score images: tables, JSON, heat-map overlays and masks. Needs onnxruntime, not torch.

    Exit status: 0 every file was read (with --watch: it was ended by SIGTERM, Ctrl-C or its time); 2 some files could
    not be read (they are named, counted and skipped), or the call was wrong; 3 an image is defective and
    --fail-on-defect was given; 1 a fault of ours; 130 interrupted, nothing is left half-written.

    Example: flawsmith predict artifacts/brushed_metal/export/model.onnx parts/ --out results

    Example: flawsmith predict model.onnx --watch /line/camera --out results --masks
    """
    if bool(inputs) == (watch is not None):
        raise typer.BadParameter("name images, folders, patterns or videos, or a folder to --watch.")
    if out is None and (watch is not None or jsonl is None):
        raise typer.BadParameter("name a folder for the results: --out DIR" + ("" if watch else ", or --out -"))
    if out == Path("-"):
        if watch is not None or jsonl is not None:
            raise UserError(
                "--out - leaves no folder, and needs no --jsonl; with --watch, name a folder and --jsonl -."
            )
        out, jsonl = None, out
    if out is None and (masks or formats):
        raise UserError("--masks and --format write into a folder; name one: --out DIR --jsonl -.")
    if watch is not None and formats and _comma_list(formats) != ("jsonl",):
        raise UserError("--watch writes results.jsonl; leave --format out.")

    from flawsmith.data.walk import count_sentence
    from flawsmith.inference.options import PredictOptions
    from flawsmith.inference.predictor import Predictor

    options = PredictOptions(
        formats=_comma_list(formats) or ("csv", "json"),
        overlays=overlays,
        masks=masks,
        jsonl=jsonl,
        batch=batch,
        workers=workers,
        every=every,
        max_pixels=int(max_megapixels * 1e6),
        poll=poll,
        seconds=watch_for,
        idle=watch_idle,
    )
    predictor = Predictor(model, threads=threads, threshold=threshold, provider=provider)
    if watch is not None and out is not None:
        from flawsmith.inference.watch import ended_by_signals, watch_folder

        with ended_by_signals() as stop:
            report = watch_folder(predictor, watch, out, options, stop)
    else:
        from flawsmith.inference.folder import predict_folder

        with _terminated_cleanly():
            report = predict_folder(predictor, inputs or [], out, options)
    for item in report.skipped:
        print(f"skipped: {item.reason}", file=sys.stderr)
    print(
        f"{count_sentence(report.good + report.defective, report.passed_over, report.unreadable)}: {report.good} good, "
        f"{report.defective} defective. Computed on {predictor.provider}."
        + ("" if report.out is None else f" Results: {report.out}"),
        file=sys.stderr if jsonl == Path("-") else sys.stdout,
    )
    raise typer.Exit(report.exit_code(fail_on_defect))


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: what is half-written vanishes."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command(rich_help_panel=USE_PANEL)
def serve(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A model.onnx. Default: the champion of --category.")
    ] = None,
    category: OneCategoryOption = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0: the system chooses.", min=0, max=65535)] = 8080,
    workers: Annotated[int, typer.Option(metavar="N", help="Images judged at once.", min=1)] = 2,
    queue: Annotated[int, typer.Option(metavar="N", help="Requests that wait; more get 429.", min=0)] = 16,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads of one run. Default: one a physical core.", min=1)
    ] = None,
    provider: ProviderOption = None,
    max_megabytes: Annotated[float, typer.Option(metavar="X", help="Larger requests get 413.", min=0.001)] = 32.0,
    max_megapixels: Annotated[float, typer.Option(metavar="X", help="Larger images get 422.", min=0.01)] = 25.0,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds a request may take.", min=0.1)] = 10.0,
    poll: Annotated[float, typer.Option(metavar="S", help="Seconds between looks for a new model.", min=0.1)] = 5.0,
    drain: Annotated[
        float, typer.Option(metavar="S", help="Seconds of 503 on /readyz between SIGTERM and the end.", min=0)
    ] = 0.0,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Judge images over HTTP, with a page to drop one on; the model is exchanged when the champion or the file changes.

    Example: flawsmith serve artifacts/brushed_metal/export/model.onnx --port 8080
    """
    from flawsmith.serve.app import Limits
    from flawsmith.serve.models import FileSource, RegistrySource, Source
    from flawsmith.serve.server import Address
    from flawsmith.serve.server import serve as act

    source: Source
    if model is not None:
        source = FileSource(model, threads, provider)
    else:
        layout = _one_layout(params, category, overrides)
        source = RegistrySource(layout.root, layout.category, threads, provider)
    limits = Limits(workers, queue, int(max_megabytes * 1e6), int(max_megapixels * 1e6), timeout)
    act(source, limits, Address(host, port), poll, drain)


@app.command(rich_help_panel=USE_PANEL)
def monitor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New production images, searched recursively.")],
    category: OneCategoryOption = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="ONNX", help="Instead of the champion's; needs --reference.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="NPZ", help="What that model answered on its calibration.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Replaced as a whole. Default: artifacts/NAME/monitor."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print drift.json instead of sentences.")] = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Compare new images with those the champion was calibrated on: report.html, drift.json, scores.csv. Exit 3: drift.

    Files that cannot be read are named, counted and skipped; too few readable ones end with exit status 2.

    Example: flawsmith monitor /line/today --category brushed_metal --out drift
    """
    layout = _one_layout(params, category, overrides)
    from flawsmith.stages.monitor import run

    outcome = run(layout, folder, out or layout.stage("monitor"), model, reference)
    for item in outcome.watched.unreadable:
        print(f"skipped: {item.reason}", file=sys.stderr)
    if as_json:
        print((outcome.out / "drift.json").read_text(), end="")
    else:
        print(*[outcome.report.reason, *outcome.report.notes, f"Results: {outcome.out}"], sep="\n")
    raise typer.Exit(outcome.exit_code)


@app.command(rich_help_panel=USE_PANEL)
def result(category: CategoryOption = None, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Say what the last run of the pipeline came to: verdict, report, next command. The end of `make repro`."""
    from flawsmith.conclusion import conclude

    for layout in _layouts(params, category, overrides):
        print(*conclude(layout), sep="\n")


@app.command(rich_help_panel=USE_PANEL)
def explain(
    triplet_id: Annotated[str, typer.Argument(metavar="TRIPLET_ID", help="As in manifest.parquet, e.g. fit-00012.")],
    category: OneCategoryOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PNG", help="The drawing. Default: TRIPLET_ID.png.")
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Make one triplet again from its manifest row, compare it bit for bit, and draw how it came about."""
    layout = _one_layout(params, category, overrides)
    from flawsmith.stages.explain import explain as draw

    target = out or Path(f"{triplet_id}.png")
    matched = draw(layout, triplet_id, target)
    print(f"{triplet_id}: drawn in {target}; {'identical to' if matched else 'DIFFERS from'} the stored triplet.")
    if not matched:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE_PANEL)
def lineage(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A registered version (CATEGORY@champion, CATEGORY/3, 3), a file, a folder, or 6 or more digits of a "
            "digest.",
        ),
    ],
    category: OneCategoryOption = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Walk back by content from a model (or any output) to the data it came from, by dvc.lock and the recorded runs.

    Exit 1 if a link is missing or a file is not what dvc.lock says.

    Example: flawsmith lineage brushed_metal@champion
    """
    from flawsmith.lineage import read_lineage, render_lineage
    from flawsmith.registry.history import describe_origin, parse_version

    named = None if Path(target).exists() else parse_version(target)
    if named is not None:
        layout = _one_layout(params, named.category or category, overrides)
        origin = describe_origin(layout, named.version)
        print(origin.text)
        complete = not origin.missing
    else:
        found = read_lineage(params.parent, _settings(params, parse_overrides(overrides or [])), target)
        print(render_lineage(found))
        complete = found.complete
    if not complete:
        raise typer.Exit(1)


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RefusalReason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Your words for the audit trail.")]


@app.command(rich_help_panel=REGISTRY_PANEL)
def register(
    category: OneCategoryOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Put the exported model into the MLflow registry with all that speaks for it. Twice the same adds nothing."""
    import dataclasses

    from flawsmith.registry.registration import register as act

    done = act(_one_layout(params, category, overrides), dry_run=dry_run)
    state = "would be registered" if dry_run and done.created else "registered" if done.created else "was there already"
    _answer(dataclasses.asdict(done), as_json, f"{done.model} version {done.version}: {state}.")


@app.command(rich_help_panel=REGISTRY_PANEL)
def promote(
    category: OneCategoryOption = None,
    version: Annotated[
        str, typer.Option("--version", metavar="N", help="The version to judge. Default: the newest.")
    ] = "",
    reason: RefusalReason = "",
    readmit: Annotated[bool, typer.Option("--readmit", help="Let a model that was rolled back stand again.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Judge a version beside the champion on the same images of today; make it the champion if every check passes.

    Exit 1 if it is refused.
    """
    layout = _one_layout(params, category, overrides)
    from flawsmith.stages.promote import run

    done = run(layout, version=version, reason=reason, readmit=readmit, dry_run=dry_run)
    lines = [f"  {'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in done.checks]
    title = f"{done.model} version {done.version}: {'would be ' if dry_run else ''}{done.outcome}. {done.reason}"
    _answer(done.to_json(), as_json, "\n".join([*lines, title]))
    if done.outcome == "refused":
        raise typer.Exit(1)


@app.command(rich_help_panel=REGISTRY_PANEL)
def rollback(
    reason: RefusalReason,
    category: OneCategoryOption = None,
    to: Annotated[str, typer.Option("--to", metavar="N", help="Version. Default: the champion before this one.")] = "",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Make the champion before the present one the champion again, and bar the present one."""
    from flawsmith.registry.promotion import rollback as act

    done = act(_one_layout(params, category, overrides), reason=reason, to=to, dry_run=dry_run)
    verb = "would be champion" if dry_run else "is champion"
    _answer(done.to_json(), as_json, f"{done.model} version {done.version} {verb} again instead of "
            f"{done.previous_champion}: {reason}")  # fmt: skip


@app.command(rich_help_panel=REGISTRY_PANEL)
def history(
    category: OneCategoryOption = None,
    _dry_run: Annotated[bool, typer.Option("--dry-run", help="Nothing to leave out: history only reads.")] = False,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Every decision on a category's models, newest last: what, when, who, why."""
    from flawsmith.registry.history import history as read
    from flawsmith.registry.history import render_history

    found = read(_one_layout(params, category, overrides))
    _answer(found, as_json, render_history(found))


def _answer(content: Mapping[str, Any], as_json: bool, text: str) -> None:
    import json

    print(json.dumps(content, indent=2, default=str) if as_json else text)


def _comma_list(texts: list[str] | None) -> tuple[str, ...]:
    """Texts, each of which may be a comma list, as one list."""
    return tuple(part.strip() for text in texts or [] for part in text.split(",") if part.strip())


if find_spec("flawsmith_lab"):  # in a checkout; the wheel leaves the laboratory out
    from flawsmith_lab.study.command import study

    app.command(rich_help_panel=STUDY_PANEL)(study)


@app.command(rich_help_panel=HOUSE_PANEL)
def check(
    categories: Annotated[
        list[str] | None, typer.Argument(metavar="[CATEGORY...]", help="Folders under data.root. Default: all.")
    ] = None,
    as_json: JsonOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Look at params.yaml and every image before anything is computed: all that would fail later, each with its remedy.

    Exit 2 if anything would fail; warnings alone exit 0. `make repro` begins with it.
    """
    from flawsmith.check import check as look

    report = look(params, categories or [], parse_overrides(overrides or []))
    _answer(report.to_json(), as_json, str(report))
    if report.errors:
        raise typer.Exit(UserError.exit_code)


@app.command(rich_help_panel=HOUSE_PANEL)
def doctor(params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Check what breaks silently: versions, stores, teacher weights, device. Exit 1 if something is wrong."""
    from flawsmith.doctor import render_checks, run_checks, worst_status

    checks = run_checks(_settings(params, parse_overrides(overrides or [])), params.parent)
    print(render_checks(checks))
    if worst_status(checks) == "fail":
        raise typer.Exit(1)


@app.command(rich_help_panel=HOUSE_PANEL)
def fetch(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="mvtec-ad")],
    category: Annotated[str, typer.Option("--category", "-c", metavar="NAME", help="E.g. bottle.")],
    mirror: Annotated[
        str | None, typer.Option("--mirror", metavar="URL", help="A folder on the web that holds CATEGORY.tar.xz.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="The archive's own address, where it has moved.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Demand this checksum instead of the known one.")
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Download one category of a public dataset into data/CATEGORY, with checksum and resume.

    Example: flawsmith fetch mvtec-ad --category bottle
    """
    from flawsmith.fetch import fetch_mvtec_ad

    if dataset != "mvtec-ad":
        raise UserError(f"`{dataset}` is no dataset that can be fetched; use mvtec-ad.")
    settings = _settings(params, parse_overrides(overrides or []))
    folder = fetch_mvtec_ad(category, params.parent / settings.data.root, base_url=mirror, url=url, sha256=sha256)
    print(f"{folder} is ready: run `dvc add {folder}`, add `{category}` to `categories` in {params}, then `dvc repro`.")


@app.command("params", rich_help_panel=HOUSE_PANEL)
def show_params(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="Only this section, e.g. distill.")] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Print every key of params.yaml: its value, meaning and bounds."""
    from flawsmith.settings import SECTIONS

    settings = _settings(params, parse_overrides(overrides or []))
    if section is not None and section not in SECTIONS:
        raise UserError(f"`{section}` is no section of params.yaml; known are {', '.join(SECTIONS)}.")
    print("\n\n".join(describe_section(settings, name) for name in SECTIONS if section in (None, name)))


def describe_section(settings: "Settings", name: str) -> str:
    """A section of params.yaml as aligned lines: key, value, meaning and bounds."""
    import dataclasses

    from flawsmith.settings import SECTIONS, section_values

    values = section_values(getattr(settings, name.replace("-", "_")))
    meanings = {
        item.name: f"{item.metadata['meaning']}{_bounds(item.metadata)}" for item in dataclasses.fields(SECTIONS[name])
    }
    key_width, value_width = max(map(len, values)), max(len(_plain(value)) for value in values.values())
    title = " ".join((SECTIONS[name].__doc__ or name).split()).replace("`", "")
    lines = [f"  {key:{key_width}}  {_plain(value):{value_width}}  {meanings[key]}" for key, value in values.items()]
    return "\n".join([title, *lines])


def _plain(value: Any) -> str:
    """As it is written in params.yaml."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(metadata: Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return f" ({' | '.join(metadata['choices'])})"
    low, high = metadata["low"], metadata["high"]
    if low is None:
        return ""
    return f" ({low:g} or more)" if high is None else f" ({low:g} to {high:g})"


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`section.key=value` texts to a mapping; values are YAML, so `[1, 2]`, `true` and `1e-3` mean what they say.

    Raises:
        UserError: a text has no `=`, or its value is not valid YAML.
    """
    import yaml

    from flawsmith.settings import read_yaml

    replaced: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.strip()):
            raise UserError(f"--set {pair}: write it as section.key=value, e.g. --set distill.batch=4.")
        try:
            replaced[key.strip()] = read_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair}: the value is not valid YAML ({' '.join(str(error).split())}).") from error
    return replaced


def _settings(params: Path, replaced: Mapping[str, Any]) -> "Settings":
    from flawsmith.settings import load_settings

    return load_settings(params, replaced)


def _layouts(params: Path, categories: list[str] | None, overrides: list[str] | None) -> list["Layout"]:
    """A layout for each wanted category; a category named on the command line need not stand in params.yaml."""
    from flawsmith.layout import Layout

    replaced = parse_overrides(overrides or [])
    if categories and "categories" in replaced:
        raise UserError("--category and --set categories=... both say which; leave one of them out.")
    if categories:
        replaced["categories"] = list(dict.fromkeys(categories))
    settings = _settings(params, replaced)
    return [Layout(settings, name, params.parent) for name in settings.categories]


def _one_layout(params: Path, category: str | None, overrides: list[str] | None) -> "Layout":
    layouts = _layouts(params, [category] if category else None, overrides)
    if len(layouts) > 1:
        names = ", ".join(layout.category for layout in layouts)
        raise UserError(f"{params} names several categories ({names}); choose one with --category.")
    return layouts[0]

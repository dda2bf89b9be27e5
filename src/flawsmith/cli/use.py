"""Commands that use a model, or tell where it comes from: predict, serve, monitor, result, explain, lineage."""

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flawsmith.cli.common import (
    DEFAULT_PARAMS,
    USE_PANEL,
    CategoryOption,
    DryRunOption,
    MqttCredentialsOption,
    MqttOption,
    MqttTopicOption,
    OneCategoryOption,
    ParamsOption,
    ProviderOption,
    SetOption,
    app,
    comma_list,
    read_layout,
    read_layouts,
    read_settings,
)
from flawsmith.errors import UserError


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
    mqtt: MqttOption = None,
    mqtt_topic: MqttTopicOption = "flawsmith/results",
    mqtt_credentials: MqttCredentialsOption = None,
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
    if watch is not None and formats and comma_list(formats) != ("jsonl",):
        raise UserError("--watch writes results.jsonl; leave --format out.")
    if watch is None and mqtt is not None:
        raise UserError("--mqtt sends the results of a hot folder; give one with --watch, or use `flawsmith serve`.")

    from flawsmith.data.walk import count_sentence
    from flawsmith.inference.options import MqttOptions, PredictOptions
    from flawsmith.inference.predictor import Predictor

    options = PredictOptions(
        formats=comma_list(formats) or ("csv", "json"),
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
        mqtt=None if mqtt is None else MqttOptions(mqtt, mqtt_topic, mqtt_credentials),
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
        + (" The model is a quick look: nothing was trained." if predictor.metadata.quick_look else "")
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
    mqtt: MqttOption = None,
    mqtt_topic: MqttTopicOption = "flawsmith/results",
    mqtt_credentials: MqttCredentialsOption = None,
    mqtt_spool: Annotated[
        Path | None, typer.Option("--mqtt-spool", metavar="DIR", help="Results wait there for the broker.")
    ] = None,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Judge images over HTTP, with a page to drop one on; the model is exchanged when the champion or the file changes.

    Example: flawsmith serve artifacts/brushed_metal/export/model.onnx --port 8080
    """
    if (mqtt is None) != (mqtt_spool is None):
        raise UserError("--mqtt needs a folder where results wait for the broker: --mqtt-spool DIR; give both.")

    from flawsmith.inference.mqtt import open_mqtt
    from flawsmith.inference.options import MqttOptions
    from flawsmith.serve.app import Limits
    from flawsmith.serve.models import FileSource, RegistrySource, Source
    from flawsmith.serve.server import Address
    from flawsmith.serve.server import serve as act

    source: Source
    if model is not None:
        source = FileSource(model, threads, provider)
    else:
        layout = read_layout(params, category, overrides)
        source = RegistrySource(layout.root, layout.category, threads, provider)
    limits = Limits(workers, queue, int(max_megabytes * 1e6), int(max_megapixels * 1e6), timeout)
    with ExitStack() as stack:
        sink = None
        if mqtt is not None and mqtt_spool is not None:
            sink = stack.enter_context(open_mqtt(MqttOptions(mqtt, mqtt_topic, mqtt_credentials), mqtt_spool))
        act(source, limits, Address(host, port), poll, drain, sink)


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
    layout = read_layout(params, category, overrides)
    from flawsmith.stages.monitor import run

    outcome = run(layout, folder, out or layout.stage("monitor"), model, reference)
    for item in outcome.watched.unreadable:
        print(f"skipped: {item.reason}", file=sys.stderr)
    if as_json:
        print((outcome.out / "drift.json").read_text(), end="")
    else:
        print(*[outcome.report.reason, *outcome.report.notes, f"Results: {outcome.out}"], sep="\n")
    raise typer.Exit(outcome.exit_code)


@app.command("learn", rich_help_panel=USE_PANEL)
def learn_verdicts(
    verdicts: Annotated[Path, typer.Argument(metavar="VERDICTS", help="What people said: JSON lines.")],
    category: OneCategoryOption = None,
    defect: Annotated[
        str, typer.Option("--defect", metavar="NAME", help="Folder in test for defective images.")
    ] = "reviewed",
    dry_run: DryRunOption = False,
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
) -> None:
    """Copy images whose verdict people agree on into the data: good ones to train/good, defective ones to test.

    Example: flawsmith learn verdicts.jsonl --category screw --dry-run
    """
    from flawsmith.dvc import run
    from flawsmith.review.learn import learn, readers
    from flawsmith.review.verdicts import opinions, read_verdicts

    layout = read_layout(params, category, overrides)
    plan = learn(layout, opinions(read_verdicts(verdicts)), defect, dry_run)
    print(*(f"left out: {sentence}" for sentence in plan.left_out), sep="\n", end="\n" if plan.left_out else "")
    print(
        f"{layout.category}: {len(plan.fit)} good image(s) {'would be' if dry_run else 'were'} copied for fit, "
        f"{len(plan.calibration)} for calibration, {len(plan.defects)} defective one(s) for test; "
        f"{len(plan.left_out)} left out."
    )
    if not plan.copies or dry_run:
        return
    folder = layout.surface().folder
    tracked = folder.with_name(f"{folder.name}.dvc")
    if tracked.is_file() and find_spec("dvc"):
        run(["dvc", "add", str(folder.resolve())], layout.root, lambda line: None)
        print(f"Recorded in {tracked}; commit it.")
    else:
        print(f"`dvc add {folder}` would keep this state of the data.")
    if (layout.root / "dvc.yaml").is_file():
        print(f"`dvc repro` will run again: {', '.join(readers(layout, plan))}, and what depends on them.")


@app.command(rich_help_panel=USE_PANEL)
def result(category: CategoryOption = None, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Say what the last run of the pipeline came to: verdict, report, next command. The end of `make repro`."""
    from flawsmith.conclusion import conclude

    for layout in read_layouts(params, category, overrides):
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
    layout = read_layout(params, category, overrides)
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
        layout = read_layout(params, named.category or category, overrides)
        origin = describe_origin(layout, named.version)
        print(origin.text)
        complete = not origin.missing
    else:
        found = read_lineage(params.parent, read_settings(params, overrides), target)
        print(render_lineage(found))
        complete = found.complete
    if not complete:
        raise typer.Exit(1)

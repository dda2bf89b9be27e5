"""What the benchmarks share: operations, seconds, matmul speed, the machine, the project, the last line."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flawsmith.config import Settings, load_settings
from flawsmith.demo.render import KINDS
from flawsmith.devices import BFLOAT16, Compute
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.layout import Layout
from flawsmith.stages import demo_data

DEMO_SURFACE = "brushed_metal"
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}  # large enough for full speed; on two cores as long as a training step


@dataclass(frozen=True)
class Target:
    """What is wanted of a measured value: at least `least`."""

    name: str
    value: float
    least: float

    @property
    def is_met(self) -> bool:
        """Whether the value reaches the target."""
        return self.value >= self.least

    def sentence(self) -> str:
        """Say value, target and outcome."""
        return f"{self.name}: {self.value:.3g} (target: at least {self.least:g}) - {'met' if self.is_met else 'MISSED'}"


def count_flops(work: Callable[[], Any]) -> int:
    """Count the floating-point operations of the convolutions and matrix products in `work`, backward passes included.

    A multiply-add is two. Norms, activations and noise count nothing, so what is achieved per second is understated.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given: without it a clock measures how fast work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Take the wall time of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def matmul(compute: Compute, side: int | None = None) -> Callable[[], float]:
    """Make a measure of FLOP/s: of one large square matrix product in the precision that training uses."""
    size = side or MATMUL_SIDE[compute.device.type]
    kind = torch.bfloat16 if compute.precision == BFLOAT16 else torch.float32
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn((size, size), generator=generator).to(compute.device, kind) for _ in range(2))
    torch.matmul(one, other)  # the first call starts threads and chooses a kernel
    return lambda: 2 * size**3 / seconds_of(lambda: torch.matmul(one, other), compute.device)


def machine(compute: Compute) -> dict[str, Any]:
    """Describe what the figures are measured on."""
    return {
        "device": torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": compute.precision == BFLOAT16,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe(found: Mapping[str, Any]) -> str:
    """Write the machine in one line; a load of a core or more means that others were measured too."""
    load = found["load_before"]
    shared = f", load average {load:.1f}" + (" (shared: figures are too low)" if load >= 1 else "") if load else ""
    precision = "bfloat16" if found["bf16"] else "float32"
    return f"{found['device']}, {found['cores']} cores, {found['threads']} threads, {precision}{shared}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Begin a command's options: `--category`, `--data` and `--params`."""
    made = argparse.ArgumentParser(prog=f"flawsmith_lab.bench.{module}", description=(doc or "").split("\n")[0])
    made.add_argument("--category", help=f"default: the first of --data, or {DEMO_SURFACE}, rendered if need be")
    made.add_argument("--data", type=Path, help="folder of categories; default: data.root of params.yaml")
    made.add_argument("--params", type=Path, default=Path("params.yaml"))
    return made


def bench_settings(
    params: Path, category: str | None, data: Path | None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Load the project's settings for a run in another folder: paths absolute, nothing recorded, one category if named.

    Raises:
        UserError: as `load_settings`.
    """
    settings = load_settings(params)
    root, weights = params.parent.resolve(), settings.teacher.weights
    changed: dict[str, Any] = {
        "categories": [category] if category else list(settings.categories),
        "data.root": str(data.resolve() if data else root / settings.data.root),
        "tracking.mode": "off",
    }
    if weights != "hub" and not weights.startswith("pypi:"):
        changed["teacher.weights"] = str(root / weights)
    return load_settings(params, changed | dict(overrides or {}))


def first_category(data: Path | None, otherwise: str) -> str:
    """Name the first category in a folder of categories; `otherwise` where no folder is named.

    Raises:
        UserError: the folder holds none.
    """
    if data is None:
        return otherwise
    found = sorted(path.parent.parent.name for path in data.glob("*/train/good"))
    if not found:
        raise UserError(f"{data} holds no category; put images into {data}/<category>/train/good, or correct --data.")
    return found[0]


def prepare(chosen: argparse.Namespace, scratch: Path, overrides: Mapping[str, Any] | None = None) -> Layout:
    """Lay out the category in a project of its own in `scratch`; the data are those asked for, or rendered there.

    Raises:
        UserError: there is no such category, or as `load_settings`.
    """
    params, data = chosen.params, chosen.data
    name = chosen.category or first_category(data, DEMO_SURFACE)
    layout = Layout(bench_settings(params, name, data, overrides), name, scratch)
    if not (Path(layout.settings.data.root) / name).is_dir():
        if data is not None or name not in KINDS:
            raise UserError(f"{layout.settings.data.root}/{name} does not exist; name another --data or --category.")
        layout = replace(layout, settings=bench_settings(params, name, scratch / "data", overrides))
        print(f"rendering the demo's {name} ...", flush=True)
        demo_data.run(layout.settings, scratch, name)
    return layout


def run_script(python: Path, script: str | None, arguments: Sequence[object], what: str) -> str:
    """Run a script that needs nothing of flawsmith in another Python; return what it printed.

    Raises:
        FlawsmithError: it failed; the message holds the last line it wrote.
    """
    # -P: this folder's modules must not hide packages of the same name; no hub may be asked for anything
    command = [str(python), "-P", str(Path(script or "").resolve()), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FlawsmithError(f"{what} failed with status {done.returncode}: {last[:300]}")
    return done.stdout


def finish(content: Mapping[str, Any]) -> None:
    """Print the result as one line of JSON, the last of stdout."""
    print(json.dumps(content, allow_nan=False), flush=True)


def guarded(main: Callable[[Sequence[str] | None], None], name: str) -> None:
    """Run a benchmark; the product's own errors end in one sentence and their exit status."""
    try:
        main(None)
    except FlawsmithError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)

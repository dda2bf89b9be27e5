"""One category from normal images to ONNX on one GPU, with a preset as in the paper: seconds, memory, accuracy.

python -m flawsmith_lab.bench.gpu [--category C] [--data DIR] [--overlay docs/gpu-params.yaml]     (make bench-gpu)
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flawsmith.config import load_content
from flawsmith.devices import Compute
from flawsmith.errors import UserError
from flawsmith.files import read_json
from flawsmith.layout import Layout
from flawsmith.stages import ddpm_train, distill, evaluate, export, synthesize, validate
from flawsmith_lab.bench import measure

MINUTES = 10.0  # target for everything together
STAGES: Mapping[str, Callable[[Layout], Any]] = {
    "ddpm-train": ddpm_train.run,
    "synthesize": synthesize.run,
    "validate": validate.run,
    "distill": distill.run,
    "evaluate": evaluate.run,
    "export": export.run,
}


def read_overlay(path: Path) -> dict[str, Any]:
    """Read a file shaped like params.yaml, but with some sections and keys only, as `section.key` → value.

    Raises:
        UserError: it is missing, no YAML, or no mapping of sections to keys. Unknown keys are refused by the settings.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a preset with --overlay.")
    content = load_content(path)
    if not all(isinstance(values, dict) for values in content.values()):
        raise UserError(f"{path} must hold sections such as `ddpm-train:` with `key: value` lines below.")
    return {f"{section}.{key}": value for section, values in content.items() for key, value in values.items()}


def run_stages(layout: Layout, device: torch.device) -> dict[str, dict[str, float]]:
    """Run every stage in order; return its seconds and the most GPU memory its tensors took, in MB (0 on a CPU)."""
    found = {}
    for name, run in STAGES.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        seconds = measure.seconds_of(partial(run, layout), device)
        peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
        found[name] = {"seconds": seconds, "gpu_peak_mb": peak}
        print(f"{name}: {seconds:.1f} s, {peak:.0f} MB of GPU memory at most", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the preset, print what it took, and end with the JSON line.

    Raises:
        UserError: there is no GPU, or the preset or the category cannot be used.
    """
    options = measure.parser("gpu", __doc__)
    options.add_argument("--overlay", type=Path, default=Path("docs/gpu-params.yaml"), help="default: %(default)s")
    options.add_argument("--out", type=Path, help="keep the stages' outputs there")
    chosen = options.parse_args(arguments)
    overlay = read_overlay(chosen.overlay)
    category = chosen.category or measure.first_category(chosen.data, measure.DEMO_SURFACE)
    measure.bench_settings(chosen.params, category, chosen.data, overlay)  # a wrong preset is said on any machine
    compute = Compute.choose()
    if compute.device.type != "cuda":
        raise UserError(
            "torch sees no GPU here, and on a CPU this preset takes days; run it on a machine with one "
            "(`flawsmith doctor` says what torch sees), or measure the CPU preset with `make bench-synthesis`."
        )
    found: dict[str, Any] = {"benchmark": "gpu", "category": category, "machine": measure.machine(compute)}
    print(f"{category}: {measure.describe(found['machine'])}")
    with nullcontext(chosen.out) if chosen.out else tempfile.TemporaryDirectory(prefix="flawsmith-gpu-") as root:
        layout = measure.prepare(chosen, Path(root), overlay)
        found["stages"] = run_stages(layout, compute.device)
        found["metrics"] = read_json(layout.stage("evaluate") / "metrics.json")
        found["onnx_megabytes"] = (layout.stage("export") / "model.onnx").stat().st_size / 1e6
    found["minutes"] = sum(stage["seconds"] for stage in found["stages"].values()) / 60
    found["target"] = {"minutes": MINUTES, "met": measure.Target("", -found["minutes"], -MINUTES).is_met}
    print(
        f"{found['minutes']:.1f} minutes in all (target: at most {MINUTES:g}) - "
        f"{'met' if found['target']['met'] else 'MISSED'}; image AUROC {found['metrics']['image_auroc']}, "
        f"AUPRO {found['metrics']['aupro']}"
    )
    measure.finish(found)


if __name__ == "__main__":
    measure.guarded(main, "bench-gpu")

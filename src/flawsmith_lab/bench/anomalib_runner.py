"""anomalib's models on arrays: `bench.anomalib_side` runs this where anomalib is installed.

    python -P anomalib_runner.py FOLDER

FOLDER holds request.json, fit.npy, calibration.npy and test.npy, (N, 3, H, W) uint8, and teacher.safetensors. Left
there: MODEL.calibration.npy and MODEL.test.npy, float32 maps (N, S, S), MODEL.scores.npz, and answer.json with seconds.

The networks, losses, coreset and optimiser settings are anomalib's own; its trainer, whose thresholds and early
stopping look at test images, is left out. Nothing is downloaded: the teacher's weights come from the file.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

Answer = dict[str, Any]


def main(folder: Path) -> None:
    """Run what request.json asks for."""
    request = json.loads((folder / "request.json").read_text())
    images = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("fit", "calibration", "test")}
    state = load_file(folder / "teacher.safetensors")
    answer: Answer = {"anomalib": import_module("anomalib").__version__, "torch": torch.__version__}
    for name in request["models"]:
        torch.manual_seed(request["seed"])  # anomalib draws from the global generator
        answer[name] = {"patchcore": patchcore, "stfpm": stfpm}[name](images, state, request, folder)
        print(f"anomalib's {name}: {answer[name]}", flush=True)
    (folder / "answer.json").write_text(json.dumps(answer))


def patchcore(images: dict[str, Any], state: dict[str, Tensor], request: Answer, folder: Path) -> Answer:
    """PatchCore (Roth et al., CVPR 2022): the two deeper levels, a greedy coreset, 9 neighbours."""
    module = import_module("anomalib.models.image.patchcore.torch_model")
    model = module.PatchcoreModel(
        layers=request["out_indices"][1:], backbone=request["backbone"], pre_trained=False, num_neighbors=9
    )
    load_teacher(model.feature_extractor.feature_extractor, state)
    model.to(device()).train()
    start = time.perf_counter()
    for batch in batches(images["fit"], request):
        model(batch)
    model.subsample_embedding(request["coreset"])
    seconds = time.perf_counter() - start
    spent = predict("patchcore", model.eval(), images, request, folder)
    return {"fit_seconds": seconds, "memory_vectors": len(model.memory_bank), **spent}


def stfpm(images: dict[str, Any], state: dict[str, Tensor], request: Answer, folder: Path) -> Answer:
    """Student-teacher feature pyramid matching (Wang et al., BMVC 2021), trained for as long as the request allows."""
    module: Any = import_module("anomalib.models.image.stfpm.torch_model")
    extractor = module.TimmFeatureExtractor

    def without_download(*arguments: Any, **keywords: Any) -> Any:
        return extractor(*arguments, **keywords | {"pre_trained": False})

    module.TimmFeatureExtractor = without_download
    try:
        model = module.STFPMModel(layers=request["out_indices"], backbone=request["backbone"])
    finally:
        module.TimmFeatureExtractor = extractor
    load_teacher(model.teacher_model.feature_extractor, state)
    model.to(device()).train()
    loss_of = import_module("anomalib.models.image.stfpm.loss").STFPMLoss()
    optimizer = torch.optim.SGD(  # the values of anomalib's Stfpm.configure_optimizers
        model.student_model.parameters(), lr=0.4, momentum=0.9, weight_decay=0.001
    )
    start, epochs = time.perf_counter(), 0.0
    generator = torch.Generator().manual_seed(request["seed"])
    while epochs < request["stfpm_epochs"] and time.perf_counter() - start < request["stfpm_seconds"]:
        order = torch.randperm(len(images["fit"]), generator=generator).numpy()
        for first in range(0, len(order), request["stfpm_batch"]):
            part = np.sort(order[first : first + request["stfpm_batch"]])
            loss = loss_of(*model(normalised(images["fit"][part], request)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epochs += len(part) / len(order)
            if time.perf_counter() - start >= request["stfpm_seconds"]:
                break
    seconds = time.perf_counter() - start
    spent = predict("stfpm", model.eval(), images, request, folder)
    return {"fit_seconds": seconds, "epochs": round(epochs, 2), "last_loss": float(loss), **spent}


def predict(name: str, model: Any, images: dict[str, Any], request: Answer, folder: Path) -> Answer:
    """Write maps and scores of the calibration and the test images; seconds an image of the model alone."""
    scores, spent, count = {}, 0.0, 0
    for part in ("calibration", "test"):
        shape = (len(images[part]), *images[part].shape[2:])
        maps = np.lib.format.open_memmap(folder / f"{name}.{part}.npy", "w+", np.float32, shape)
        found: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for batch in batches(images[part], request):
                start = time.perf_counter()
                answer = model(batch)
                wait()
                spent, count = spent + time.perf_counter() - start, count + len(batch)
                first = sum(len(values) for values in found)
                maps[first : first + len(batch)] = answer.anomaly_map.reshape(len(batch), *shape[1:]).float().cpu()
                found.append(answer.pred_score.reshape(len(batch)).float().cpu().numpy())
        maps.flush()
        scores[part] = np.concatenate(found)
    np.savez(folder / f"{name}.scores.npz", **scores)  # type: ignore[arg-type]
    return {"seconds_an_image": spent / count}


def load_teacher(body: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Load the exchanged weights: all that anomalib's backbone has, but for blocks beyond the teacher's deepest."""
    result = body.load_state_dict({key: state[key] for key in state if key in body.state_dict()}, strict=False)
    depth = max((block(key) for key in state), default=-1)
    lost = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    lost = [key for key in lost if depth < 0 or block(key) <= depth]
    if lost:
        sys.exit(f"the teacher's weights lack {lost[0]} and {len(lost) - 1} more of anomalib's backbone")


def block(key: str) -> int:
    """Number of the block that a weight belongs to (`blocks.3.0.conv.weight`: 3), -1 outside of them."""
    place = re.match(r"blocks\.(\d+)\.", key)
    return int(place.group(1)) if place else -1


def batches(images: NDArray[np.uint8], request: Answer) -> Iterator[Tensor]:
    """The images in their order, ready for the networks."""
    for first in range(0, len(images), request["batch"]):
        yield normalised(images[first : first + request["batch"]], request)


def normalised(images: NDArray[np.uint8], request: Answer) -> Tensor:
    """(B, 3, H, W) uint8 → float32 with the teacher's mean and deviation."""
    mean, std = (np.asarray(request[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return torch.from_numpy((images.astype(np.float32) / np.float32(255) - mean) / std).to(device())


def device() -> torch.device:
    """The GPU where there is one, as flawsmith does."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Let a GPU finish before the clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

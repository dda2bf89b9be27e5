"""Where a model computes, with onnxruntimes that offer what this machine does not have."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from line_samples import environment

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference import providers
from flawsmith.inference.network import Network

NAMES = providers.NAMES
GPU_BUILD, OPENVINO_BUILD, CPU_BUILD = ("tensorrt", "cuda", "cpu"), ("openvino", "cpu"), ("cpu",)


@dataclass
class Runtime:
    """Plays onnxruntime: sessions are real, on the CPU, but say that they compute elsewhere.

    Attributes:
        offers: the providers it was built with.
        broken: those that do not load: `raises`, or as CUDA does, which leaves the CPU without a word.
        asked: the providers of each session, with their options.
    """

    offers: Sequence[str]
    broken: Sequence[str] = ()
    raises: bool = False
    asked: list[list[tuple[str, dict[str, str]]]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Runtime":
        real = onnxruntime.InferenceSession

        def session(model: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
            assert enable_fallback == 0  # with it onnxruntime prints to stdout
            self.asked.append(providers)
            made = real(model, options, providers=[NAMES["cpu"]])
            loaded = [name for name, _ in providers if name not in [NAMES[other] for other in self.broken]]
            if self.raises and len(loaded) < len(providers):
                raise RuntimeError("libcublas.so.13:\ncannot open")
            made.get_providers = lambda: loaded
            return made

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [NAMES[name] for name in self.offers])
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn"))
        return self


@pytest.fixture(autouse=True)
def nothing_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(providers.VARIABLE, raising=False)
    monkeypatch.delenv(providers.DEVICE_VARIABLE, raising=False)
    providers._warn.cache_clear()
    providers._load_cuda.cache_clear()


@pytest.mark.parametrize(
    ("offers", "asked", "variable", "device", "used"),
    [
        (CPU_BUILD, None, "", "", "cpu"),
        (CPU_BUILD, None, "", "cuda", "cpu"),  # a demand on torch
        (GPU_BUILD, None, "", "", "cuda"),  # not TensorRT
        (OPENVINO_BUILD, None, "", "", "openvino"),
        (GPU_BUILD, "tensorrt", "", "", "tensorrt"),
        (GPU_BUILD, "cpu", "cuda", "cuda", "cpu"),  # the option counts most
        (GPU_BUILD, "auto", "cpu", "", "cuda"),
        (GPU_BUILD, None, "tensorrt", "cpu", "tensorrt"),
        (GPU_BUILD, None, "auto", "cpu", "cpu"),
        (GPU_BUILD, None, "", "cpu", "cpu"),
        (GPU_BUILD, None, "", "auto", "cuda"),
        (OPENVINO_BUILD, None, "openvino", "cuda", "openvino"),
    ],
)
def test_the_first_that_is_there_or_the_one_demanded(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    offers: Sequence[str], asked: str | None, variable: str, device: str, used: str,
) -> None:  # fmt: skip
    runtime = Runtime(offers).install(monkeypatch)
    monkeypatch.setenv(providers.VARIABLE, variable)
    monkeypatch.setenv(providers.DEVICE_VARIABLE, device)
    assert Network(model, threads=3, provider=asked).provider == used
    (wanted,) = runtime.asked
    assert wanted[0][0] == NAMES[used]
    assert wanted[-1][0] == NAMES["cpu"]
    options = dict(wanted)
    if used in ("cuda", "tensorrt"):
        assert options[NAMES["cuda"]]["use_tf32"] == "0"
    if used == "openvino":
        assert options[NAMES[used]] == {"precision": "ACCURACY", "num_of_threads": "3"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("asked", "variable", "words"),
    [
        ("cuda", "", "--provider is cuda, .* has only cpu here; .*`pip install onnxruntime-gpu`"),
        (None, "tensorrt", "FLAWSMITH_PROVIDER is tensorrt, .*`pip install onnxruntime-gpu`"),
        (None, "openvino", "FLAWSMITH_PROVIDER is openvino, .*`pip install onnxruntime-openvino`"),
        ("gpu", "", "--provider is `gpu`; it must be one of auto, cpu, cuda, tensorrt, openvino"),
        (None, "CUDA", "FLAWSMITH_PROVIDER is `CUDA`; it must be one of"),
    ],
)
def test_what_is_demanded_but_not_there_is_told_with_the_remedy(
    model: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, variable: str, words: str
) -> None:
    Runtime(CPU_BUILD).install(monkeypatch)
    monkeypatch.setenv(providers.VARIABLE, variable)
    with pytest.raises(UserError, match=words):
        Network(model, provider=asked)


@pytest.mark.parametrize("raises", [False, True])
def test_one_that_does_not_load_is_left_out_and_told_once_but_never_if_it_was_demanded(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    Runtime(GPU_BUILD, broken=["cuda"], raises=raises).install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert [Network(model).provider for _ in range(2)] == ["cpu", "cpu"]
    (told,) = caplog.messages
    assert "offers cuda here, but it does not load" in told
    assert ("libcublas.so.13: cannot open" in told) == raises
    with pytest.raises(UserError, match=r"offers cuda here, but it does not load.*--provider or FLAWSMITH_PROVIDER"):
        Network(model, provider="cuda")


def test_a_device_that_gives_up_is_told_with_the_remedy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(model)

    def run(*_: object) -> None:
        raise RuntimeError("CUDA failure 2:\nout of memory")

    monkeypatch.setattr(network, "_session", SimpleNamespace(run=run))
    with pytest.raises(FlawsmithError, match=r"2 images on cpu \(CUDA failure 2: out of memory\); score fewer at once"):
        network.run(np.zeros((2, 3, 32, 32), np.float32))


def test_a_damaged_model_is_not_blamed_on_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime(GPU_BUILD).install(monkeypatch)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot be loaded as an ONNX model"):
        Network(tmp_path / "model.onnx", provider="cuda")


def test_nothing_is_left_in_the_home_folder_and_nobody_is_called(model: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from flawsmith.inference.network import Network; Network(Path({str(model)!r}))"
    variables = {key: value for key, value in environment().items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env=variables | {"HOME": str(tmp_path / "home")}, check=True)
    assert not (tmp_path / "home").exists()


def test_versions_are_told_of_onnxruntimes_other_builds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "version", lambda name: f"{name} 1")  # would raise: onnxruntime-gpu is another
    assert providers.package_version("onnxruntime") == onnxruntime.__version__
    assert providers.package_version("onnx") == "onnx 1"

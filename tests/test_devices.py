"""The choice of device and precision: by what the machine has, by params.yaml, by environment; here with fakes."""

from collections.abc import Mapping

import pytest
import torch

from flawsmith.config import ComputeSettings
from flawsmith.devices import AUTO, BFLOAT16, CPU, FLOAT32, Compute, has_fast_bf16
from flawsmith.errors import UserError
from flawsmith.processes import is_main_process, world_size

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU computes bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)


@pytest.fixture(autouse=True)
def nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAWSMITH_DEVICE", raising=False)
    monkeypatch.delenv("FLAWSMITH_PRECISION", raising=False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("device", "precision", "environment", "expected"),
    [
        (AUTO, AUTO, {}, Compute(CUDA, BFLOAT16)),
        ("cuda", FLOAT32, {}, Compute(CUDA, FLOAT32)),
        ("cpu", BFLOAT16, {}, Compute(CPU.device, BFLOAT16)),
        (AUTO, BFLOAT16, {"FLAWSMITH_PRECISION": FLOAT32}, Compute(CUDA, FLOAT32)),
        ("cuda", FLOAT32, {"FLAWSMITH_DEVICE": "cpu", "FLAWSMITH_PRECISION": BFLOAT16}, Compute(CPU.device, BFLOAT16)),
    ],
)
def test_a_gpu_is_used_by_itself_and_what_is_asked_for_counts_more(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, environment: Mapping[str, str], expected: Compute
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Compute.choose(ComputeSettings(device, precision)) == expected


@pytest.mark.parametrize(("capabilities", "precision"), [({"amx_bf16": True}, BFLOAT16), ({"avx2": True}, FLOAT32)])
def test_a_cpu_computes_in_bf16_where_its_hardware_does(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert Compute.choose() == Compute(CPU.device, precision)
    assert has_fast_bf16(CPU.device) is (precision == BFLOAT16)


def test_what_is_not_there_is_refused_by_the_name_of_what_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^compute\.device is cuda"):
        Compute.choose(ComputeSettings("cuda", AUTO))
    monkeypatch.setenv("FLAWSMITH_DEVICE", "cuda")
    with pytest.raises(UserError, match=r"^FLAWSMITH_DEVICE is cuda"):
        Compute.choose()
    monkeypatch.setenv("FLAWSMITH_DEVICE", "gpu")
    with pytest.raises(UserError, match="FLAWSMITH_DEVICE is `gpu`; it must be one of auto, cpu, cuda"):
        Compute.choose()


def test_autocast_is_bf16_where_chosen_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, image = torch.nn.Linear(4, 4), torch.rand(2, 4)
    coarse = Compute(CPU.device, BFLOAT16)
    with CPU.autocast():
        assert layer(image).dtype == torch.float32
    with coarse.autocast():
        assert layer(image).dtype == torch.bfloat16
        with coarse.exactly():
            assert layer(image).dtype == torch.float32


def test_the_switches_of_fast_math_are_put_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), Compute(CUDA).fast_math():
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
        raise ZeroDivisionError
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    with CPU.fast_math():
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_the_main_process_is_known_by_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_process()
    assert world_size() == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_main_process()
    assert world_size() == 2

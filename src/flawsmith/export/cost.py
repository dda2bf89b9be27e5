"""What a network costs for one image: multiply-adds, counted by torch, and the numbers that it holds."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

REST = "rest"  # the part of operations that belong to no module of the detector


def count_cost(detector: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Count one image of height and width `shape`; returns the content of cost.json.

    A multiply-add is one product that enters a sum: half of what torch calls FLOPs. Convolutions and matrix products
    count; a bias or an activation counts nothing. `parameters` are floating-point numbers, trained or remembered. Parts
    are the detector's own modules, types torch's names of operations.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector(torch.zeros(1, 3, *shape))
    counts = counter.get_flop_counts()
    root = type(detector).__name__
    parameters, flops = Counter[str](), Counter[str]()
    for name, tensor in (*detector.named_parameters(), *detector.named_buffers()):
        if tensor.is_floating_point():
            part, dot, _ = name.partition(".")
            parameters[part if dot else REST] += tensor.numel()
    for part, module in detector.named_children():
        # a mere list of modules is never called itself, only what it holds
        called = [f"{root}.{part}", *(f"{root}.{part}.{name}" for name, _ in module.named_children())]
        found = [counts[name] for name in called if name in counts]
        flops[part] = sum(found[0].values()) if called[0] in counts else sum(sum(each.values()) for each in found)
    flops[REST] = counter.get_total_flops() - flops.total()
    by_type = {str(operation).rpartition(".")[2]: total // 2 for operation, total in counts["Global"].items()}
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "parameters": parameters.total(),
        "by_part": {
            part: {"multiply_adds": flops[part] // 2, "parameters": parameters[part]}
            for part in sorted({*flops, *parameters})
        },
        "by_type": dict(sorted(by_type.items())),
    }


def describe_cost(cost: dict[str, Any]) -> str:
    """One line for the log, the costliest part first."""
    parts = sorted(cost["by_part"].items(), key=lambda item: -item[1]["multiply_adds"])
    named = [f"{part} {figures['multiply_adds'] / 1e6:.0f}M" for part, figures in parts if figures["multiply_adds"]]
    return (
        f"{cost['multiply_adds'] / 1e9:.2f}G multiply-adds an image ({', '.join(named)}), "
        f"{cost['parameters'] / 1e6:.2f}M parameters"
    )

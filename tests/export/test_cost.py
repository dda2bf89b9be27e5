"""Multiply-adds and parameters: against sums done by hand."""

from toy_detector import SIZE, Exported

from flawsmith.detector.model import Detector
from flawsmith.export.cost import count_cost, describe_cost


def test_a_small_network_counted_by_hand(exported: Exported) -> None:
    cost = count_cost(exported.detector, (SIZE, SIZE))
    cells = (SIZE // 4) ** 2
    encoder = cells * 8 * 3 * 3 * 3
    decoder = cells * (8 * 8 * 3 * 3 + 8 * 8)
    smoothing = SIZE * (SIZE + 8) * 9 + SIZE * SIZE * 9  # the first of two passes keeps the other axis' border
    by_part = {part: figures["multiply_adds"] for part, figures in cost["by_part"].items()}
    assert by_part == {"encoder": encoder, "decoder": decoder, "rest": smoothing}
    assert cost["multiply_adds"] == cost["by_type"]["convolution"] == encoder + decoder + smoothing
    parameters = {part: figures["parameters"] for part, figures in cost["by_part"].items()}
    weights = {"encoder": 8 * 3 * 9 + 8 + 4 * 8, "decoder": 8 * 8 * 9 + 8 + 2 * 8 + 8 * 8 + 8, "rest": 3 + 9}
    assert parameters == weights
    assert cost["parameters"] == sum(weights.values())


def test_the_real_detectors_parts_are_named_and_its_memory_is_counted(small_detector: Detector) -> None:
    cost = count_cost(small_detector, small_detector.config.shape)
    parts = cost["by_part"]
    assert {"teacher", "student", "head", "memories"} <= set(parts)
    assert parts["memories"]["parameters"] >= sum(bank.patches.numel() for bank in small_detector.banks.values())
    assert all(parts[name]["multiply_adds"] > 0 for name in ("teacher", "student", "head", "memories"))
    assert sum(part["multiply_adds"] for part in parts.values()) == cost["multiply_adds"]
    assert describe_cost(cost).startswith(f"{cost['multiply_adds'] / 1e9:.2f}G multiply-adds an image (")

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_detector import SIZE, Exported

from flawsmith.errors import FlawsmithError
from flawsmith.export.onnx import export_network, map_range, strip_provenance, write_model
from flawsmith.inference.predictor import Predictor


def test_any_batch_gives_maps_and_scores(exported: Exported) -> None:
    predictor = Predictor(exported.path)
    for batch in (1, 2, 5, 11):
        predictions = predictor.predict(list(exported.images[:batch]))
        with torch.inference_mode():
            maps, scores = exported.detector(torch.from_numpy(exported.images[:batch]))
        for row, prediction in enumerate(predictions):
            np.testing.assert_allclose(prediction.anomaly_map, maps[row, 0].numpy(), atol=1e-5)
            assert prediction.score == pytest.approx(scores[row].item(), abs=1e-5)


def test_the_file_is_whole(exported: Exported) -> None:
    assert Predictor(exported.path).metadata == exported.metadata
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert {path.name for path in exported.path.parent.glob("*[!g]")} == {"model.onnx", "network.onnx"}  # no weights
    shape = onnx.load(exported.path).graph.input[0].type.tensor_type.shape
    assert [item.dim_param or item.dim_value for item in shape.dim] == ["batch", 3, SIZE, SIZE]


def test_nothing_of_the_machine_is_left_in_the_file(exported: Exported) -> None:
    content = exported.path.read_bytes()
    for trace in (b".py", b"site-packages", b'File "', str(Path.cwd()).encode(), str(Path.home()).encode() + b"/"):
        assert trace not in content
    model = onnx.load(exported.path)
    assert not model.doc_string
    assert all(entry.key.startswith("flawsmith.") for entry in model.metadata_props)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not re.search(rb"stack_trace|class_hierarchy|fx_node", content)


def test_the_same_weights_give_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    export_network(exported.detector, (SIZE, SIZE), 18, again)
    write_model(onnx.load(again), exported.metadata, again)
    assert again.read_bytes() == exported.path.read_bytes()


def test_traces_inside_branches_and_functions_go_too() -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = onnx.helper.make_node("Identity", ["x"], [name], doc_string='File "secret.py"')
        onnx.helper.set_model_props(node, {"stack": "secret.py"})
        return onnx.helper.make_graph([node], name, [], [], doc_string="secret.py")

    choice = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    graph = onnx.helper.make_graph([choice], "g", [], [])
    function = onnx.helper.make_function("d", "f", ["x"], ["y"], list(branch("y").node), [], doc_string="secret.py")
    model = onnx.helper.make_model(graph, functions=[function], doc_string="secret.py")
    assert b"secret" in model.SerializeToString()
    strip_provenance(model)
    assert b"secret" not in model.SerializeToString()
    assert len(model.graph.node) == len(model.functions) == 1


def test_a_detector_in_training_mode_is_refused(exported: Exported, tmp_path: Path) -> None:
    training = type(exported.detector)()
    with pytest.raises(FlawsmithError, match="training mode"):
        export_network(training, (SIZE, SIZE), 18, tmp_path / "m.onnx")


class Undecided(nn.Module):
    """Its path depends on the pixels: no graph can hold it."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anomaly_map = image[:, :1]
        if image.sum() > 1:
            anomaly_map = -anomaly_map
        return anomaly_map, anomaly_map.flatten(1).mean(1)


class Swapped(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image.flatten(1).mean(1), image[:, :1] * 2


def test_a_detector_that_cannot_be_exported_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FlawsmithError, match="cannot be exported to ONNX opset 18"):
        export_network(Undecided().eval(), (SIZE, SIZE), 18, tmp_path / "m.onnx")
    with pytest.raises(FlawsmithError, match="has the shapes"):
        export_network(Swapped().eval(), (SIZE, SIZE), 18, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_the_pixel_threshold_has_the_middle_colour(median: float, threshold: float) -> None:
    maps = np.full((2, 1, 4, 4), median, np.float32)
    low, high = map_range(maps, threshold)
    assert low < threshold < high or threshold == pytest.approx(low, abs=1e-4)
    assert (low + high) / 2 == pytest.approx(threshold)

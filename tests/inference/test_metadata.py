from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_onnx import write_toy

from flawsmith.errors import UserError
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor

KEYS = [item.name for item in fields(ModelMetadata) if item.default is MISSING]  # the others came later
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        ModelMetadata,
        threshold=finite,
        pixel_threshold=finite,
        false_alarm_rate=finite,
        map_low=finite,
        map_high=finite,
    )
)
def test_what_is_written_is_read_back_to_the_last_digit(metadata: ModelMetadata) -> None:
    assert ModelMetadata.from_properties(metadata.to_properties(), "model.onnx") == metadata


def test_other_tools_properties_and_those_of_older_files_do_not_disturb(metadata: ModelMetadata) -> None:
    properties = {**metadata.to_properties(), "category": "somebody else's", "flawsmith.input_size": "32"}
    assert ModelMetadata.from_properties(properties, "model.onnx") == metadata


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_property_is_named(metadata: ModelMetadata, key: str) -> None:
    properties = metadata.to_properties()
    del properties[f"flawsmith.{key}"]
    with pytest.raises(UserError, match=rf"m\.onnx is not a flawsmith model .*`flawsmith\.{key}`"):
        ModelMetadata.from_properties(properties, "m.onnx")


@pytest.mark.parametrize(("key", "value"), [("threshold", "nan"), ("pixel_threshold", "high"), ("white_level", "32.5")])
def test_a_damaged_property_is_named(metadata: ModelMetadata, key: str, value: str) -> None:
    properties = {**metadata.to_properties(), f"flawsmith.{key}": value}
    with pytest.raises(UserError, match=rf"`flawsmith\.{key}` is '{value}'"):
        ModelMetadata.from_properties(properties, "m.onnx")


@pytest.mark.parametrize(
    ("key", "default"),
    [("scale", 0.0), ("tile_overlap", 0), ("white_level", 0), ("precision", "fp32"), ("typical_score", 0.0)],
)
def test_a_file_from_before_there_was_a_property_has_its_default(
    metadata: ModelMetadata, key: str, default: object
) -> None:
    properties = replace(metadata, white_level=4095).to_properties()
    del properties[f"flawsmith.{key}"]
    assert getattr(ModelMetadata.from_properties(properties, "m"), key) == default


@pytest.mark.parametrize(("key", "value"), [("scale", -1.0), ("tile_overlap", 17), ("tile_overlap", -1)])
def test_tiles_that_cannot_be_are_damage(tmp_path: Path, key: str, value: float) -> None:
    model = write_toy(tmp_path / "m.onnx", **{"scale": 0.5, "tile_overlap": 16, key: value})
    with pytest.raises(UserError, match=r"m\.onnx has damaged metadata"):
        Predictor(model)

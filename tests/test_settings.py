"""params.yaml: what is wrong is refused in one sentence that names the key; what is right comes back unchanged."""

import copy
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from flawsmith import settings as settings_module
from flawsmith.errors import UserError
from flawsmith.files import digest_json
from flawsmith.settings import (
    SECTIONS,
    load_settings,
    parse_section,
    parse_settings,
    read_yaml,
    section_values,
    settings_digest,
)
from flawsmith.stages.ddpm_train import SAMPLE_STEPS

SHIPPED = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())


def shipped() -> dict[str, Any]:
    return copy.deepcopy(SHIPPED)


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(content, "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml: ")
    assert "\n" not in message
    return message


def keys() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            yield name, item, hints[item.name]


def item_kind(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


ALL = [pytest.param(name, item, kind, id=f"{name}.{item.name}") for name, item, kind in keys()]
BOUNDED = [
    pytest.param(name, item, kind, id=f"{name}.{item.name}")
    for name, item, kind in keys()
    if item.metadata["low"] is not None
]
WRONG_TYPE: dict[Any, Any] = {int: 1.5, float: "much", str: 3, bool: 1}


def test_the_shipped_file_is_valid() -> None:
    settings = parse_settings(SHIPPED, "params.yaml")
    assert settings.categories
    for name in SECTIONS:
        assert section_values(getattr(settings, name.replace("-", "_"))) == SHIPPED[name]


@pytest.mark.parametrize(("section", "item", "kind"), ALL)
def test_every_key_has_a_meaning_and_is_required(section: str, item: dataclasses.Field[Any], kind: Any) -> None:
    content = shipped()
    del content[section][item.name]
    message = refusal(content)
    assert f"`{section}.{item.name}` is missing" in message
    assert item.metadata["meaning"] in message


@pytest.mark.parametrize(("section", "item", "kind"), ALL)
def test_every_key_refuses_another_type(section: str, item: dataclasses.Field[Any], kind: Any) -> None:
    wrong: Any = WRONG_TYPE[item_kind(kind)]
    if typing.get_origin(kind) is tuple:
        refused = [wrong, [wrong] * max(1, len(SHIPPED[section][item.name]))]
        for value in refused if item.metadata["may_be_empty"] else [*refused, []]:
            content = shipped()
            content[section][item.name] = value
            assert f"`{section}.{item.name}`" in refusal(content)
    else:
        for value in (wrong, None, [SHIPPED[section][item.name]], {}):
            content = shipped()
            content[section][item.name] = value
            assert f"`{section}.{item.name}` must be" in refusal(content)


@pytest.mark.parametrize(("section", "item", "kind"), BOUNDED)
def test_every_bound_is_closed_and_enforced(section: str, item: dataclasses.Field[Any], kind: Any) -> None:
    number = item_kind(kind)
    for bound, outside in ((item.metadata["low"], -1), (item.metadata["high"], 1)):
        if bound is None:
            continue
        beyond = bound + outside if number is int else bound + outside * max(abs(bound), 1e-6) * 1e-3
        for value, allowed in ((number(bound), True), (number(beyond), False)):
            content = {**SHIPPED[section], item.name: _shaped(kind, value, SHIPPED[section][item.name])}
            if allowed:
                parsed = getattr(parse_section(section, content, SECTIONS[section], "params.yaml"), item.name)
                assert parsed == (tuple(content[item.name]) if isinstance(content[item.name], list) else value)
            else:
                with pytest.raises(UserError, match=rf"`{section}\.{item.name}` is .*; it must be"):
                    parse_section(section, content, SECTIONS[section], "params.yaml")


def _shaped(kind: Any, value: Any, shipped_value: Any) -> Any:
    return [value] * len(shipped_value) if typing.get_origin(kind) is tuple else value


@pytest.mark.parametrize(("section", "item", "kind"), [case for case in BOUNDED if item_kind(case.values[2]) is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_nan_or_infinite(section: str, item: dataclasses.Field[Any], kind: Any, value: float) -> None:
    content = shipped()
    content[section][item.name] = _shaped(kind, value, SHIPPED[section][item.name])
    assert f"`{section}.{item.name}` is {value}" in refusal(content)


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_names_the_nearest(section: str) -> None:
    key = dataclasses.fields(SECTIONS[section])[0].name
    content = shipped()
    content[section][key + "x"] = 1
    assert f"unknown key `{section}.{key}x`; did you mean `{key}`?" in refusal(content)


def test_an_unknown_key_unlike_any_lists_what_is_known() -> None:
    content = shipped()
    content["tracking"]["zzzzzz"] = 1
    assert "known are mode, experiment_prefix" in refusal(content)


@pytest.mark.parametrize("section", ["categories", *SECTIONS])
def test_every_section_is_required_and_typos_name_the_nearest(section: str) -> None:
    content = shipped()
    value = content.pop(section)
    assert f"section `{section}` is missing" in refusal(content)
    content[section + "s"] = value
    assert f"unknown section `{section}s`; did you mean `{section}`?" in refusal(content)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_a_section_must_be_a_mapping(section: str, value: object) -> None:
    assert f"section `{section}` must hold" in refusal({**shipped(), section: value})


@pytest.mark.parametrize(
    ("categories", "reason"),
    [
        ([], "empty"),
        ("metal", "must be a list"),
        (["a", "a"], "names 'a' twice"),
        ([815], "holds 815, which YAML reads as int, not as text; write the name of the folder in quotes"),
        ([1000.0], "reads as float"),
        ([None], "reads as NoneType"),
        ([["a"]], "reads as list"),
        (["Plate", "plate"], "differ only by case"),
        (["part-1", "part_1"], "differ only by case or by"),
        (["a" * 101], "has 101 characters"),
        (["part.dvc"], "ends as files do that DVC"),
        *(
            ([name], "no plain folder name")
            for name in (
                "",
                ".",
                "..",
                ".hidden",
                "../up",
                "a/b",
                "a\\b",
                "Teil 7",
                "a@b",
                "a:b",
                "-c",
                "a.",
                "a\n",
                "Größe_ü",
                "$HOME",
                "a*",
                "a;b",
                "'a'",
                "\uff41",
            )
        ),
    ],
)
def test_bad_categories(categories: object, reason: str) -> None:
    assert reason in refusal({**shipped(), "categories": categories})


def test_categories_that_every_tool_can_carry() -> None:
    names = ["0815", "1e3", "true", "Teil.7-B_v2", "_a", "x.yaml", "a" * 100]
    assert parse_settings({**shipped(), "categories": names}, "params.yaml").categories == tuple(names)


@pytest.mark.parametrize(
    "text",
    ["0815", "4711", "0123", "0o17", "0x1F", "0b11", "1_000", "1e3", "1e-3", "+1e-2", "1.", ".5", ".5e-3", "-.inf",
     ".nan", "12:30", "1.5:30", "on", "off", "yes", "n", "true", "~", "null", "2026-11-30", "'0815'", '"1e3"', "1__",
     "0o", "08.5", "+", "1e", "0815a", "[0815, on]", "{a: 017}"],
)  # fmt: skip
def test_yaml_means_what_it_means_to_dvc(text: str) -> None:
    theirs = YAML(typ="safe").load(f"key: {text}")
    assert repr(read_yaml(f"key: {text}")) == repr(theirs)


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("data", "image_size", 250, "multiple of 32"),
        ("ddpm-train", "crop", 56, "`ddpm-train.crop` is 56; it must be a multiple of 16"),
        ("ddpm-train", "crop", 512, "at most data.image_size"),
        ("synthesize", "windows", [64, 72], "`synthesize.windows` is 72"),
        ("synthesize", "strength", [0.2, 0.1], "write the lower bound first"),
        ("export", "variants", ["int8", "int8"], "names one twice"),
        ("synthesize", "strength", [0.1], "a range of two numbers"),
        ("synthesize", "strength", [0.1, 0.2, 0.3], "a range of two numbers"),
        ("teacher", "out_indices", [1, 2], "three levels"),
        ("teacher", "out_indices", [3, 2, 1], "finest first"),
        ("teacher", "out_indices", [1, 1, 2], "three levels"),
        ("distill", "cosine_weights", [1.0], "`distill.cosine_weights` needs 2 values"),
        ("distill", "cosine_weights", [0.0, 0.0], "`distill.cosine_weights` are all 0"),
        ("distill", "decoder_channels", [16] * 4, "the teacher has 3 scales"),
        ("distill", "map_weights", [1.0, 1.0], "`distill.map_weights` needs 5 values"),
        ("distill", "map_weights", [0.0] * 5, "not all 0"),
        ("distill", "score_weights", [1.0] * 4, "`distill.score_weights` needs 5 values"),
        ("distill", "score_weights", [0.0] * 5, "not all 0"),
        ("synthesize", "rule", "realnt", "one of constant, realnet"),
        ("synthesize", "validation_fraction", 0.0, "`synthesize.validation_fraction` is 0.0; it must be from 0.001"),
        ("synthesize", "triplets", 1, "`synthesize.triplets` is 1; it must be from 2"),
        ("synthesize", "visibility", 1.0, "`synthesize.visibility` is 1.0; it must be from 0.0 to 0.9"),
        ("synthesize", "perlin_threshold", [1.0, 1.0], "`synthesize.perlin_threshold` is 1.0; it must be"),
        ("synthesize", "area", [0.0, 0.00001], "`synthesize.area` is [0.0, 1e-05], which no mask"),
        ("synthesize", "area", [0.25, 0.3], "inside `synthesize.windows` [64, 80, 96, 112, 128]"),
        ("synthesize", "area", [0.25, 0.3], "`synthesize.feather` 2; change one of them"),
        ("validate", "mask_area", [0.1, 0.2], "so the gate would always fail"),
        ("ddpm-train", "channels", [32, 60], "`ddpm-train.channels` has 60; each must be a multiple of 8"),
        ("ddpm-train", "train_timesteps", 39, "`ddpm-train.train_timesteps` is 39; it must be from 40"),
        ("export", "opset", 29, "it must be from 17 to 28"),
    ],
)
def test_bad_combinations_and_choices(section: str, key: str, value: object, reason: str) -> None:
    content = shipped()
    content[section][key] = value
    assert reason in refusal(content)


def test_true_is_no_whole_number() -> None:
    content = shipped()
    content["distill"]["batch"] = True
    assert "`distill.batch` must be a whole number, not True" in refusal(content)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), ("+1e-2", 1e-2)])
def test_exponents_mean_numbers_as_they_do_for_dvc(params_path: Path, text: str, value: float) -> None:
    content = shipped()
    content["ddpm-train"]["learning_rate"] = "HERE"
    params_path.write_text(yaml.safe_dump(content).replace("HERE", text))
    assert load_settings(params_path).ddpm_train.learning_rate == value


@pytest.mark.parametrize(("text", "mode"), [("on", "on"), ("off", "off"), ("'off'", "off")])
def test_on_and_off_need_no_quotes(params_path: Path, text: str, mode: str) -> None:
    assert "mode: 'off'" in params_path.read_text()
    params_path.write_text(params_path.read_text().replace("mode: 'off'", f"mode: {text}"))
    assert load_settings(params_path).tracking.mode == mode


def test_overrides_replace_values_and_are_checked(params_path: Path) -> None:
    assert load_settings(params_path, {"distill.batch": 3}).distill.batch == 3
    assert load_settings(params_path, {"categories": ["mine"]}).categories == ("mine",)
    with pytest.raises(UserError, match=r"unknown key `distill\.btach`; did you mean `batch`"):
        load_settings(params_path, {"distill.btach": 3})
    with pytest.raises(UserError, match="unknown section `distil`; did you mean `distill`"):
        load_settings(params_path, {"distil.batch": 3})
    for both in ({"distill": 3, "distill.batch": 3}, {"distill.batch": 3, "distill": 3}):
        with pytest.raises(UserError, match="`distill` must hold"):
            load_settings(params_path, both)


@pytest.mark.parametrize("key", ["categories.x", "categories.", "distill."])
def test_an_override_that_replaces_nothing_is_refused(params_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"`{key}` cannot be replaced"):
        load_settings(params_path, {key: 1})


@pytest.mark.parametrize("added", ["distill:\n  batch: 3\n", "validate: {worst: 1, worst: 2}\n"])
def test_a_key_that_stands_twice_is_refused(params_path: Path, added: str) -> None:
    params_path.write_text(params_path.read_text() + added)
    with pytest.raises(UserError, match=r"`(distill|validate|worst)` stands twice"):
        load_settings(params_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"synthesize.steps": 41, "ddpm-train.train_timesteps": 40}, r"`synthesize\.steps` is 41; it must be at most"),
        ({"distill.normal_share": 0.6, "distill.batch": 1}, "all 1 images of a batch would be defect-free"),
        ({"distill.normal_share": 0.9, "distill.batch": 4}, "all 4 images of a batch would be defect-free"),
    ],
)
def test_keys_that_can_never_work_together_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_settings(Path(__file__).parents[1] / "params.yaml", overrides)


def test_a_plain_sample_fits_into_the_shortest_diffusion() -> None:
    assert settings_module.SAMPLE_STEPS == SAMPLE_STEPS


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a: [1", "not valid YAML"), ("- 1", "it holds list"), ("", "it holds NoneType"), ("a: \x00", "not valid YAML")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_settings(path)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*--params"):
        load_settings(tmp_path / "params.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(path)


def _values(kind: Any, metadata: Any, length: int) -> st.SearchStrategy[Any]:
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        one = _values(item, metadata, 0)
        if rest == [...]:
            return st.lists(one, min_size=0 if metadata["may_be_empty"] else 1, max_size=5)
        return st.lists(one, min_size=1 + len(rest), max_size=1 + len(rest)).map(sorted)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.sampled_from(metadata["choices"]) if metadata["choices"] else st.text(max_size=20)
    low, high = metadata["low"], metadata["high"]
    if kind is int:
        return st.integers(low, high)
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


@given(st.data())
def test_what_is_inside_the_bounds_survives_the_round_trip(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SECTIONS)))
    section = SECTIONS[name]
    hints = typing.get_type_hints(section)
    content = {
        item.name: data.draw(_values(hints[item.name], item.metadata, 3)) for item in dataclasses.fields(section)
    }
    parsed = parse_section(name, content, section, "params.yaml")
    assert section_values(parsed) == content
    again = parse_section(name, yaml.safe_load(yaml.safe_dump(section_values(parsed))), section, "params.yaml")
    assert again == parsed
    assert settings_digest(again) == settings_digest(parsed)


def test_the_digest_tells_every_value_apart() -> None:
    settings = parse_settings(SHIPPED, "params.yaml")
    digest = settings_digest(settings.distill)
    assert digest == settings_digest(parse_settings(shipped(), "elsewhere.yaml").distill)
    assert digest != settings_digest(dataclasses.replace(settings.distill, seed=settings.distill.seed + 1))
    assert digest != settings_digest(settings.distill, settings.teacher)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("validate.outside_margin", 3, "must be at least synthesize.feather"),
        ("validate.min_triplets", SHIPPED["synthesize"]["triplets"] + 1, "the gate would always fail"),
    ],
)
def test_a_gate_that_could_never_pass_is_refused(key: str, value: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_settings(Path(__file__).parents[1] / "params.yaml", {key: value})


def test_without_a_scale_the_digest_knows_nothing_of_tiles() -> None:
    data = parse_settings(SHIPPED, "params.yaml").data
    digest = settings_digest(data)
    old = {
        key: value for key, value in section_values(data).items() if key not in ("scale", "tile_overlap", "max_tiles")
    }
    assert digest == digest_json({"DataSettings": old})  # what was made before tiles were known is not made again
    assert digest == settings_digest(dataclasses.replace(data, tile_overlap=8, max_tiles=7))
    tiled = dataclasses.replace(data, scale=0.5)
    assert len({digest, settings_digest(tiled), settings_digest(dataclasses.replace(tiled, tile_overlap=8))}) == 3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scale": 0.001}, r"`data\.scale` is 0\.001; it must be 0 .* or from 0\.01 to 2"),
        ({"scale": 3}, r"`data\.scale` is 3"),
        (
            {"scale": 1, "tile_overlap": 129},
            r"`data\.tile_overlap` is 129; it must be at most half of data\.image_size",
        ),
    ],
)
def test_tiles_that_cannot_be_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_settings(
            Path(__file__).parents[1] / "params.yaml", {f"data.{key}": value for key, value in values.items()}
        )

"""params.yaml: what is wrong is refused in one sentence that names the key; what is right comes back unchanged."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from flawsmith.config import SECTIONS, load_settings, parse_settings, read_yaml
from flawsmith.errors import UserError
from flawsmith.sections import describe, parse_section, rule, section_values, settings_digest
from flawsmith.synthesis.config import default_windows

PARAMS = Path(__file__).parents[1] / "params.yaml"
SHIPPED = yaml.safe_load(PARAMS.read_text())


def shipped(**values: Any) -> dict[str, Any]:
    """params.yaml with values replaced by their `section__key`, sections' hyphens written as underscores."""
    content = copy.deepcopy(SHIPPED)
    for name, value in values.items():
        section, _, key = name.partition("__")
        content.setdefault(section.replace("_", "-"), {})[key] = value
    return content


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(content, "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml")
    assert "\n" not in message
    return message


def test_the_shipped_file_names_known_keys_and_the_rest_has_defaults() -> None:
    settings = parse_settings(SHIPPED, "params.yaml")
    for name in SECTIONS:
        section = section_values(getattr(settings, name.replace("-", "_")))
        assert section.items() >= SHIPPED.get(name, {}).items()
    bare = parse_settings({"categories": ["plate"]}, "params.yaml")
    assert bare == replace(settings, categories=("plate",))  # params.yaml spells out defaults; it changes none


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_described_and_keeps_its_bounds(section: str) -> None:
    for key, item in describe(SECTIONS[section]).items():
        assert item["description"]
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in item:
                with pytest.raises(UserError, match=rf"`{section}\.{key}` is .*; it must be a .*number") as caught:
                    parse_section(section, {key: item[bound] + step}, SECTIONS[section], "params.yaml")
                assert rule(item) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"distill__btach": 3}, "unknown key `distill.btach`; did you mean `batch`?"),
        ({"tracking__zzzzzz": 3}, "unknown key `tracking.zzzzzz`; known are mode, experiment_prefix"),
        ({"distil__batch": 3}, "unknown section `distil`; did you mean `distill`?"),
        ({"distill__batch": 2000}, "`distill.batch` is 2000; it must be a whole number from 1 to 1024."),
        ({"distill__batch": True}, "`distill.batch` is True; it must be a whole number"),
        ({"distill__batch": 1.5}, "`distill.batch` is 1.5; it must be a whole number"),
        ({"distill__batch": None}, "`distill.batch` is None; it must be a whole number"),
        ({"distill__smoothing": float("nan")}, "`distill.smoothing` is nan; it must be a number from 0 to 64"),
        ({"distill__smoothing": "much"}, "`distill.smoothing` is 'much'; it must be a number"),
        ({"ddpm_train__flip": 1}, "`ddpm-train.flip` is 1; it must be true or false"),
        ({"teacher__backbone": 3}, "`teacher.backbone` is 3; it must be text"),
        ({"synthesize__rule": "realnt"}, "`synthesize.rule` is 'realnt'; it must be one of constant, realnet"),
        ({"synthesize__windows": []}, "`synthesize.windows` is []; it must be a list: each a whole number from 16"),
        ({"synthesize__windows": 64}, "`synthesize.windows` is 64; it must be a list"),
        ({"synthesize__strength": [0.2, 0.1]}, "it must be a range [low, high]: both a number from 0 to 10"),
        ({"synthesize__strength": [0.1]}, "it must be a range [low, high]"),
        ({"synthesize__strength": [0.1, 0.2, 0.3]}, "it must be a range [low, high]"),
        ({"data__image_size": 250}, "from 64 to 2048, a multiple of 32"),
        ({"data__scale": 0.001}, "`data.scale` is 0.001; it must be 0 (the whole image is seen) or from 0.01"),
        ({"data__scale": 1, "data__tile_overlap": 129}, "it must be at most half of data.image_size"),
        ({"ddpm_train__crop": 56}, "`ddpm-train.crop` is 56; it must be a multiple of 16"),
        ({"ddpm_train__crop": 512}, "at most data.image_size"),
        ({"ddpm_train__channels": [32, 60]}, "a multiple of 8"),
        ({"synthesize__windows": [64, 72]}, "`synthesize.windows` is 72"),
        ({"synthesize__steps": 41, "ddpm_train__train_timesteps": 40}, "`synthesize.steps` is 41; it must be at most"),
        ({"synthesize__area": [0.0, 0.00001]}, "`synthesize.area` is [0.0, 1e-05], which no mask"),
        ({"synthesize__area": [0.25, 0.3]}, "inside `synthesize.windows` [64, 80, 96, 112, 128]"),
        ({"synthesize__mixture": {"owm": 1.0}}, "it must be a mapping of any of illumination"),
        ({"synthesize__mixture": {"own": 0.0}}, "has no share above 0; give one to a source"),
        ({"synthesize__shade_change": [0.01, 0.3]}, "or nobody could see the shade"),
        ({"synthesize__shade_area": [0.1, 0.9]}, "the gate would fail on shades"),
        ({"validate__mask_area": [0.1, 0.2]}, "so the gate would always fail"),
        ({"validate__outside_margin": 3}, "must be at least synthesize.feather"),
        ({"validate__min_triplets": 1000}, "so the gate would always fail"),
        ({"teacher__out_indices": [1, 2]}, "it must be a list of three"),
        ({"teacher__out_indices": [3, 2, 1]}, "three levels, finest first"),
        ({"distill__normal_share": 0.6, "distill__batch": 1}, "all 1 images of a batch would be defect-free"),
        ({"distill__cosine_weights": [1.0]}, "`distill.cosine_weights` is [1.0]; it needs 2 values"),
        ({"distill__cosine_weights": [0.0, 0.0]}, "not all 0"),
        ({"export__variants": ["int8", "int8"]}, "names one twice"),
        ({"monitor__permutations": 99}, "with `monitor.alpha` 0.01 it must be 200 or more"),
        ({"monitor__min_images": 2000}, "above `monitor.max_images`"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], reason: str) -> None:
    assert reason.lower() in refusal(shipped(**values)).lower()


def test_a_section_is_a_mapping_and_may_be_empty_or_left_out() -> None:
    for value in (3, "text", [1]):
        assert "`distill` must hold `key: value` lines" in refusal({**shipped(), "distill": value})
    for content in ({**SHIPPED, "monitor": None}, {name: SHIPPED[name] for name in SHIPPED if name != "monitor"}):
        assert parse_settings(content, "params.yaml").monitor == SECTIONS["monitor"]()


NO_FOLDER_NAMES = (
    "", ".", "..", ".hidden", "../up", "a/b", "a\\b", "Teil 7", "a@b", "a:b", "-c", "a.", "a\n", "Größe_ü", "$HOME",
    "a*", "a;b", "'a'", "\uff41",
)  # fmt: skip


@pytest.mark.parametrize(
    ("categories", "reason"),
    [
        (None, "must be a list"),
        ([], "must be a list of one name or more"),
        ("metal", "must be a list"),
        (["a", "a"], "names 'a' twice"),
        ([815], "holds 815, which YAML reads as int, not as text; write the name of the folder in quotes"),
        (["Plate", "plate"], "differ only by case"),
        (["part-1", "part_1"], "differ only by case or by"),
        (["a" * 101], "has 101 characters"),
        (["part.dvc"], "ends as files do that DVC"),
        *(([name], "no plain folder name") for name in NO_FOLDER_NAMES),
    ],
)
def test_bad_categories(categories: object, reason: str) -> None:
    assert reason in refusal({**SHIPPED, "categories": categories})


def test_categories_that_every_tool_can_carry() -> None:
    names = ["0815", "1e3", "true", "Teil.7-B_v2", "_a", "x.yaml", "a" * 100]
    assert parse_settings({**SHIPPED, "categories": names}, "params.yaml").categories == tuple(names)


def test_values_for_one_call_replace_those_of_the_file(params_path: Path) -> None:
    assert load_settings(params_path, {"distill.batch": 3}).distill.batch == 3
    assert load_settings(params_path, {"categories": ["mine"]}).categories == ("mine",)
    assert load_settings(params_path, {"distill.batch": 3, "distill": {"patience": 2}}).distill.batch == 3
    for wrong in ({"distill.btach": 3}, {"distil.batch": 3}, {"distill": 3, "distill.batch": 3}):
        with pytest.raises(UserError, match="distil"):
            load_settings(params_path, wrong)
    for key in ("categories.x", "categories.", "distill."):
        with pytest.raises(UserError, match=f"`{key}` cannot be replaced"):
            load_settings(params_path, {key: 1})


@pytest.mark.parametrize("text", ["0815", "0123", "1e3", "1e-3", "+1e-2", "on", "off", "no", "12:30", "'0815'"])
def test_yaml_means_what_it_means_to_dvc(text: str) -> None:
    assert repr(read_yaml(f"key: {text}")) == repr(YAML(typ="safe").load(f"key: {text}"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- 1", "it holds list"),
        (b"", "it holds NoneType"),
        (b"a: \x00", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"distill:\n  batch: 3\ndistill:\n  batch: 3\n", 'duplicate key "distill", line 3'),
        (b"validate: {worst: 1, worst: 2}\n", 'duplicate key "worst"'),
        (None, "does not exist.*--params"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        load_settings(path)


def test_the_digest_tells_every_value_apart_but_those_that_decide_nothing() -> None:
    settings = parse_settings(SHIPPED, "params.yaml")
    digest = settings_digest(settings.distill)
    assert digest == settings_digest(parse_settings(shipped(), "elsewhere.yaml").distill)
    assert digest != settings_digest(replace(settings.distill, seed=settings.distill.seed + 1))
    assert digest != settings_digest(settings.distill, settings.teacher)
    data = settings.data
    assert settings_digest(data) == settings_digest(replace(data, tile_overlap=8, max_tiles=7))  # nothing is tiled
    tiled = replace(data, scale=0.5)
    assert len({settings_digest(item) for item in (data, tiled, replace(tiled, tile_overlap=8))}) == 3


def test_keys_that_follow_others_do_so_unless_they_are_named() -> None:
    content = {"categories": ["a"], "seed": 3, "synthesize": {"feather": 5.5, "visibility": 0.04}}
    follows = parse_settings(content, "p")
    assert follows.data.split_seed == follows.distill.seed == follows.monitor.seed == 3
    assert follows.demo_data.seed == 7
    assert (follows.validate.outside_margin, follows.validate.visible_change) == (8, 0.04)
    assert parse_settings({**content, "distill": {"seed": 4}}, "p").distill.seed == 4
    for wrong in (-1, True, 1.0, "x"):
        assert "`seed` is" in refusal({**SHIPPED, "seed": wrong})


@pytest.mark.parametrize(("size", "multiple"), [(64, 16), (96, 16), (256, 16), (256, 1), (1024, 16), (2048, 64)])
def test_windows_follow_the_image(size: int, multiple: int) -> None:
    windows = default_windows(size, multiple)
    assert list(windows) == sorted(set(windows))
    assert all(32 <= side <= min(size, 1024) and side % multiple == 0 for side in windows)
    assert min(windows) <= max(size // 4, 32) + multiple
    settings = parse_settings({"categories": ["a"], "data": {"image_size": size}}, "p")
    assert settings.synthesize.windows == default_windows(size, 16)
    assert default_windows(256, 16) == (64, 80, 96, 112, 128)


OWN = {"categories": ["a", "b"], "distill": {"batch": 4}, "overrides": {"b": {"data": {"scale": 0.5}, "distill": None}}}


def test_a_category_may_have_its_own_values() -> None:
    settings = parse_settings(OWN, "params.yaml")
    assert (settings.of("a").data.scale, settings.of("b").data.scale) == (0.0, 0.5)
    assert settings.of("b").distill == settings.distill
    own = {"categories": ["a"], "overrides": {"a": {"synthesize": {"visibility": 0.04}}}}
    assert parse_settings(own, "params.yaml").of("a").validate.visible_change == 0.04  # what follows, follows


def test_a_value_for_one_call_counts_more_than_a_category_s_own(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(OWN))
    assert load_settings(path, {"data.scale": 0.7}).of("b").data.scale == 0.7
    assert load_settings(path, {"distill": {"batch": 2}}).of("b").distill.batch == 2
    assert load_settings(path, {"categories": ["c"]}).of("c").data.scale == 0.0  # those of the others are no matter
    assert load_settings(path, {"categories": ["b"]}).of("b").data.scale == 0.5


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (3, "`overrides` must hold"),
        ({"bb": {}}, "`overrides.bb` names no category; did you mean `b`?"),
        ({"b": 3}, "`overrides.b` must hold sections"),
        ({"b": {"dat": {}}}, "unknown section `overrides.b.dat`; did you mean `data`?"),
        ({"b": {"tracking": {}}}, "unknown section `overrides.b.tracking`"),
        ({"b": {"data": 3}}, "`overrides.b.data` must hold `key: value` lines"),
        ({"b": {"data": {"scal": 1}}}, "unknown key `overrides.b.data.scal`; did you mean `scale`?"),
        ({"b": {"data": {"scale": 3}}}, "`overrides.b.data.scale` is 3; it must be a number from 0 to 2"),
        ({"b": {"data": {"root": "x"}}}, "`overrides.b.data.root` cannot be"),
        ({"b": {"data": {"scale": 1, "tile_overlap": 200}}}, "with `overrides.b`, `data.tile_overlap` is 200"),
        ({"b": {"validate": {"min_triplets": 999}}}, "with `overrides.b`, `validate.min_triplets` is 999"),
    ],
)
def test_a_category_s_own_values_are_held_to_the_same_rules(overrides: Any, reason: str) -> None:
    assert reason in refusal({**OWN, "overrides": overrides})

"""What a person may call a registered version, and what is left to files and digests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.registry.history import VersionName, parse_version


@pytest.mark.parametrize(
    ("text", "category", "version"),
    [
        ("plate@champion", "plate", "champion"),
        ("plate/3", "plate", "3"),
        ("plate/12345678", "plate", "12345678"),
        ("flawsmith-plate/3", "plate", "3"),
        ("flawsmith-plate@champion", "plate", "champion"),
        ("models:/flawsmith-plate/3", "plate", "3"),
        ("models:/flawsmith-plate@champion", "plate", "champion"),
        ("models:/plate/3", "plate", "3"),
        ("brushed_metal/10", "brushed_metal", "10"),
        ("line-2.left/1", "line-2.left", "1"),
        ("abcdef/1", "abcdef", "1"),
        ("back side/2", "back side", "2"),
        ("flawsmith-back side@champion", "back side", "champion"),
        ("3", "", "3"),
        ("99999", "", "99999"),
    ],
)
def test_a_version_is_known_by_any_of_its_names(text: str, category: str, version: str) -> None:
    assert parse_version(text) == VersionName(category, version)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plate",
        "champion",
        "@champion",
        "/3",
        "plate/",
        "plate@",
        "plate@latest",
        "plate@3",
        "plate/champion",
        "plate/-1",
        "plate/3.5",
        "plate/3x",
        "-3",
        "3\n",
        "plate/3\n",
        "plate/3 ",
        "models:/flawsmith-plate",
        "models:/",
        "runs:/0123456789/model",
        "model.onnx",
        "artifacts/plate/3",
        "artifacts/plate/export/model.onnx",
        "/artifacts/3",
        "../3",
        "./plate/3",
    ],
)
def test_anything_else_is_no_version(text: str) -> None:
    assert parse_version(text) is None


@given(st.text("0123456789abcdef", min_size=6, max_size=64))
def test_six_digits_or_more_are_a_digests(text: str) -> None:
    assert parse_version(text) is None


@given(st.integers(0, 99_999))
def test_fewer_decimal_digits_are_a_version_of_the_only_category(number: int) -> None:
    assert parse_version(str(number)) == VersionName("", str(number))


categories = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,11}", fullmatch=True).filter(
    lambda name: not name.startswith("flawsmith-")
)


@given(categories, st.one_of(st.integers(1, 10**6).map(str), st.just("champion")))
def test_the_short_and_the_long_names_of_a_version_mean_the_same(category: str, version: str) -> None:
    joint = "@" if version == "champion" else "/"
    for prefix in ("", "flawsmith-", "models:/flawsmith-"):
        assert parse_version(f"{prefix}{category}{joint}{version}") == VersionName(category, version)

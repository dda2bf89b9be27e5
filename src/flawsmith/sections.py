"""What all sections of params.yaml share: types of their keys, sentences about wrong ones, their values and digests.

A section is a frozen pydantic dataclass in the `config.py` of its package. Each key has a default, bounds and a
description:

    @dataclass(frozen=True, config=STRICT)
    class EvaluateSettings:
        batch: int = Field(8, ge=1, le=1024, description="images scored together")
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from flawsmith.errors import UserError
from flawsmith.files import digest_json

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # `true` is no number, "3" neither
Number = TypeVar("Number", int, float)


def _in_order(ends: tuple[Number, Number]) -> tuple[Number, Number]:
    if ends[0] > ends[1]:
        raise ValueError("the lower bound comes first")
    return ends


Range = Annotated[tuple[Number, Number], AfterValidator(_in_order)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=100)]
Rate = Annotated[float, Field(ge=1e-7, le=1)]  # of learning
Seed = Annotated[int, Field(ge=0)]


def parse_section(name: str, content: Any, section: type, source: str) -> Any:
    """Build a section from its part of params.yaml.

    Raises:
        UserError: a key is unknown or its value is not allowed; `source` and the key are named.
    """
    for problem in section_problems(name, content, section):
        raise UserError(f"{source}: {problem}")
    return section(**tuples(content))


def section_problems(name: str, content: Any, section: type, place: str = "") -> Iterator[str]:
    """Say in one sentence each what is wrong with a section's keys; `place` goes before its name (`overrides.x.`)."""
    name = place + name
    if not isinstance(content, Mapping):
        yield f"`{name}` must hold `key: value` lines."
        return
    known = describe(section)
    for key in content:
        if key not in known:
            yield f"unknown key `{name}.{key}`{nearest(str(key), list(known))}"
    try:
        section(**tuples({key: value for key, value in content.items() if key in known}))
    except ValidationError as error:
        told = set()
        for item in error.errors(include_url=False):
            key = str(item["loc"][0]) if item["loc"] else ""
            if not key:  # a rule that ties keys together
                yield f"{f'with `{place[:-1]}`, ' if place else ''}{item['ctx']['error']}"
            elif key not in told:
                told.add(key)
                yield f"`{name}.{key}` is {content[key]!r}; it must be {rule(known[key])}."


@cache
def describe(section: type) -> dict[str, dict[str, Any]]:
    """Name each key's type, bounds, default and description, as JSON Schema does."""
    properties: dict[str, dict[str, Any]] = TypeAdapter(section).json_schema()["properties"]
    return properties


def rule(key: Mapping[str, Any]) -> str:
    """Put into words what a key's JSON Schema allows: `a whole number from 1 to 1024`."""
    if "enum" in key:
        return f"one of {', '.join(key['enum'])}"
    if key["type"] == "object":
        names, value = key["propertyNames"]["enum"], rule(key["additionalProperties"])
        return f"a mapping of any of {', '.join(names)}, each to {value}"
    if key["type"] == "array":
        items = key.get("items") or key["prefixItems"][0]
        shapes = {0: "a list: each", 2: "a range [low, high]: both", 3: "a list of three: each"}
        return f"{shapes[len(key.get('prefixItems', ()))]} {rule(items)}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    low, high = key.get("minimum"), key.get("maximum")
    bounds = "" if low is None else f" of {low} or more" if high is None else f" from {low:.10g} to {high:.10g}"
    multiple = f", a multiple of {key['multipleOf']}" if "multipleOf" in key else ""
    return words[key["type"]] + bounds + multiple


def nearest(key: str, known: Sequence[str]) -> str:
    """End a sentence about an unknown name: with the nearest known one, else with all."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(known)}."


def section_values(section: Any) -> dict[str, Any]:
    """Return a section as plain JSON values (tuples as lists)."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(section).items()}


def deciding_values(section: Any) -> dict[str, Any]:
    """Return `section_values` without the keys that decide nothing beside the others (`idle`, where it has them)."""
    idle: Sequence[str] = getattr(section, "idle", ())
    return {key: value for key, value in section_values(section).items() if key not in idle}


def settings_digest(*sections: Any) -> str:
    """SHA-256 of sections: what a checkpoint was made with."""
    return digest_json({type(section).__name__: deciding_values(section) for section in sections})


def tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, as the sections hold them: a frozen section must not hold what can be changed."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}

"""Which part of the package knows which."""

import ast
from collections import defaultdict
from pathlib import Path

import flawsmith

PACKAGE = Path(flawsmith.__file__).parent


def known_parts() -> dict[str, set[str]]:
    """Folder of the package → the folders it imports from, late imports included."""
    known: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, *rest = name.split(".")
                if top == "flawsmith" and rest and (PACKAGE / rest[0]).is_dir() and rest[0] != part:
                    known[part].add(rest[0])
    return known


def test_no_two_parts_know_each_other() -> None:
    known = known_parts()
    assert "monitoring" in known["registry"]
    assert {(one, other) for one in known for other in known[one] if one in known.get(other, ())} == set()

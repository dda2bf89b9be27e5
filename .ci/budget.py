"""How large the project may be. `make lint` and CI run this; a number goes up only with a reason in the commit."""

import ast
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LINES = {  # of Python, a folder
    "src/flawsmith": 23_580,
    "src/flawsmith_lab": 3_300,
    "flows": 1_850,
    "tests": 23_710,
}
KEYS = 50  # in params.yaml
DOCS = 87_700  # bytes of Markdown in docs/
README = 150  # lines
FILE = 400  # lines of a module of src/ or flows/
PARAMETERS = 7  # of a function there, but for commands: their options are the command line
COMMANDS = ("src/flawsmith/cli", "src/flawsmith_lab/study/command.py")


def parameters(path: Path) -> list[tuple[int, str]]:
    """How many parameters each function of a module takes, `self` and `cls` apart."""
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [
        (
            sum(argument.arg not in ("self", "cls") for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)),
            f"{path}: {f.name}",
        )
        for f in functions
        for a in [f.args]
    ]


def lines(path: Path) -> int:
    """Lines of a text file."""
    return path.read_text().count("\n")


def keys(content: object) -> int:
    """Leaves of nested mappings."""
    return sum(map(keys, content.values())) if isinstance(content, dict) else 1


def main() -> int:
    """Print what is over its budget, or each figure with `--show`; 1 if anything is over."""
    modules = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in LINES}
    code = [path for folder, paths in modules.items() if folder != "tests" for path in paths]
    commands = tuple(str(ROOT / name) for name in COMMANDS)
    found: list[tuple[int, int, str]] = [
        (sum(map(lines, paths)), LINES[folder], folder) for folder, paths in modules.items()
    ]
    found.append((keys(yaml.safe_load((ROOT / "params.yaml").read_text())), KEYS, "keys of params.yaml"))
    found.append((sum(path.stat().st_size for path in (ROOT / "docs").rglob("*.md")), DOCS, "bytes of docs"))
    found.append((lines(ROOT / "README.md"), README, "lines of README.md"))
    found += [(lines(path), FILE, f"lines of {path.relative_to(ROOT)}") for path in code]
    found += [
        (count, PARAMETERS, f"parameters of {name}")
        for path in code
        if not str(path).startswith(commands)
        for count, name in parameters(path)
    ]
    over = [f"{count:,} {what}, budget {budget:,}" for count, budget, what in found if count > budget]
    if "--show" in sys.argv:
        print("\n".join(f"{count:>7,} of {budget:,} {what}" for count, budget, what in found[: len(LINES) + 3]))
        print("\n".join(f"{count:>7,} {what}" for count, _, what in sorted(found[len(LINES) + 3 :], reverse=True)[:12]))
    print("\n".join(over), file=sys.stderr)
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())

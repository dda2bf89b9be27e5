"""The house's own rules, beside the tests rather than before them: lint, format, types, size."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULES = {
    "types": ("mypy",),  # first: it takes longest
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "budget": (sys.executable, ".ci/budget.py"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_is_in_order(rule: str) -> None:
    command, *arguments = RULES[rule]
    program = Path(sys.executable).parent / command  # whatever PATH says; an absolute one stays
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

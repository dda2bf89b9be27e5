"""git, met in this one module as its command: which revision is checked out, and commands that `dvc.publish` needs."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flawsmith.errors import UserError

GIT_SECONDS = 120


def run_git(root: Path, *arguments: str, fails: bool = False, environment: Mapping[str, str] | None = None) -> str:
    """What git prints; commits are by flawsmith.

    Args:
        root: a folder of the repository.
        arguments: the command's words.
        fails: git may fail; the answer is empty then.
        environment: further variables for git.

    Raises:
        UserError: git is missing, hangs, or fails although it must not.
    """
    who = {"NAME": "flawsmith", "EMAIL": "flawsmith@localhost"}
    values = {
        **os.environ,
        **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()},
        "GIT_TERMINAL_PROMPT": "0",
        **(environment or {}),
    }
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=root, env=values, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`git {arguments[0]}` cannot be run in {root}: {error}.") from error
    if finished.returncode == 0:
        return finished.stdout.strip()
    if fails:
        return ""
    raise UserError(f"`git {arguments[0]}` failed in {root}: {' '.join(finished.stderr.split())}")


def git_state(root: Path) -> tuple[str, bool]:
    """The checked-out revision ("unknown" without one), and whether tracked files differ from it.

    dvc.lock and artifacts/ are left out: `dvc repro` itself rewrites them between stages.
    """
    excluded = (":(exclude)dvc.lock", ":(exclude)artifacts")
    try:
        revision = run_git(root, "rev-parse", "HEAD")
        return revision, bool(run_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded))
    except UserError:  # no git, no repository, or no commit yet
        return "unknown", False


def has_revision(root: Path, revision: str) -> bool:
    """Whether the repository at `root` holds this commit."""
    try:
        run_git(root, "cat-file", "-e", f"{revision}^{{commit}}")
    except UserError:
        return False
    return True

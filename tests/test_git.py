from pathlib import Path

import pytest

from flawsmith.errors import UserError
from flawsmith.git import git_state, has_revision, run_git


def test_the_revision_is_told_and_changes_are_told_from_outputs(tmp_path: Path) -> None:
    assert git_state(tmp_path) == ("unknown", False)
    run_git(tmp_path, "init", "-q")
    for name in ("code.py", "dvc.lock"):
        (tmp_path / name).write_text("1")
    run_git(tmp_path, "add", "code.py", "dvc.lock")
    run_git(tmp_path, "commit", "-qm", "start")
    (tmp_path / "dvc.lock").write_text("2")
    revision, is_changed = git_state(tmp_path)
    assert has_revision(tmp_path, revision)
    assert not has_revision(tmp_path, "0" * 40)
    assert not is_changed
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == (revision, True)


def test_a_command_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    assert run_git(tmp_path, "log", fails=True) == ""
    with pytest.raises(UserError, match=r"`git log` failed in .*not a git repository"):
        run_git(tmp_path, "log")
    with pytest.raises(UserError, match="cannot be run"):
        run_git(tmp_path / "nowhere", "log")

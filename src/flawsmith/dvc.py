"""DVC, met in this one module: which stages a category has, one stage at a time, data in and results out.

DVC is run as its command, as a person would run it, so that what a flow does can be done again by hand. Each call of
`reproduce` costs DVC's start, under a second.
"""

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from flawsmith.config import Settings
from flawsmith.errors import DISK_FULL, FlawsmithError, QualityGateError, UserError
from flawsmith.files import digest_file, digest_json, read_json
from flawsmith.git import run_git
from flawsmith.processes import Finished, stream

OnLine = Callable[[str], None]
Ran = Literal["ran", "restored", "unchanged"]

# What DVC says when the fault lies outside the project. Its exit status is 255 whatever happened.
INFRASTRUCTURE = re.compile(
    r"is busy, it is being blocked by|Unable to acquire lock|Another DVC process|timed? ?out|"
    r"[Cc]onnect(ion|ing)?\b.*(refused|reset|fail|error|abort|broken)|Could not connect|Temporary failure|"
    r"Name or service not known|Network is unreachable|No space left on device|Input/output error|"
    r"Stale file handle|database is locked|Broken pipe|Service Unavailable|SlowDown|Too Many Requests|"
    r"error\.dvc\.org/missing-files"  # DVC says so too of an HTTP remote that does not answer
)
# What DVC advises a person to do after a stage; in a flow's log it would be most of the text.
ADVICE = re.compile(
    r"\s*(To track the changes with git, run:|To enable auto staging, run:|git add |dvc config core\.autostage|"
    r"Use `dvc push` to send)"
)
STORE_DOWN = "The MLflow tracking store"  # how flawsmith.connection begins the sentence about a store out of reach
UNEXPECTED = "flawsmith: unexpected "
FIRST_SIGNAL = 128  # a shell's exit status for a command killed by signal N is 128 + N


class InfrastructureError(FlawsmithError):
    """The machine, the network or a server failed, not the data or the settings: trying again may help."""


class GateFailed(QualityGateError):  # noqa: N818 - it says what happened
    """The quality gate of the triplets said no.

    Attributes:
        verdict: the content of verdict.json.
    """

    def __init__(self, message: str, verdict: dict[str, Any]) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True)
class Artefact:
    """A file or folder by its content: the path relative to the project's root, and DVC's MD5."""

    path: str
    digest: str


@dataclass(frozen=True)
class LockedStage:
    """What dvc.lock proves of one run of a stage: what it read and left, and the digests of its code and params."""

    name: str
    category: str
    inputs: tuple[Artefact, ...]
    outputs: tuple[Artefact, ...]
    code: str = ""
    params: str = ""

    @property
    def target(self) -> str:
        """What `dvc repro` calls it."""
        return f"{self.name}@{self.category}" if self.category else self.name


@dataclass(frozen=True)
class StageOutcome:
    """What `dvc repro` did for a stage: ran it, took its results from the run cache, or found it unchanged."""

    target: str
    did: Ran
    seconds: float


def stages_of(root: Path, settings: Settings, category: str) -> list[str]:
    """The stages of one category as targets of `dvc repro`, in dvc.yaml's order.

    Those of all demo surfaces belong to them, categories or not: what dvc.lock does not know of, nobody can pull.

    Raises:
        UserError: the category is not in params.yaml, or dvc.yaml cannot be read.
    """
    if category not in settings.categories:
        raise UserError(
            f"`{category}` is no category of params.yaml (known are {', '.join(settings.categories)}); "
            "add it to `categories` there."
        )
    targets = []
    for name, stage in read_stages(root).items():
        variables = set(stage.get("matrix", {}))
        if variables == {"category"}:
            targets.append(f"{name}@{category}")
        elif variables == {"surface"}:
            targets += [f"{name}@{surface}" for surface in stage["matrix"]["surface"]]
        elif not variables:
            targets.append(name)
    return targets


def small_outputs(root: Path, category: str) -> list[Path]:
    """The category's results that belong to a commit (`cache: false` in dvc.yaml), relative to root, if they exist."""
    found = []
    for stage in read_stages(root).values():
        for entry in [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]:
            if isinstance(entry, dict):
                found += [path for path, how in entry.items() if isinstance(how, dict) and how.get("cache") is False]
    paths = [Path(path.replace("${item.category}", category)) for path in found]
    return [path for path in paths if (root / path).is_file()]


def read_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml as it names them.

    Raises:
        UserError: it is missing or cannot be read.
    """
    path = root / "dvc.yaml"
    try:
        stages = yaml.safe_load(path.read_text())["stages"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; start from the project's own folder.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no `stages:` that can be read ({' '.join(str(error).split())}).") from error
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"{path}: `stages:` must map names to stages.")
    return stages


def reproduce(root: Path, target: str, on_line: OnLine, environment: Mapping[str, str] | None = None) -> StageOutcome:
    """Run `dvc repro --single-item target` and hand over its lines as they come, without DVC's advice.

    Raises:
        GateFailed: the stage is the quality gate, and it said no.
        UserError: the stage refused its input.
        InfrastructureError: the stage or DVC was killed, a lock, the network or the MLflow store stood in the way, or
            the stage met something it did not expect.
        FlawsmithError: anything else.
    """
    started = time.monotonic()
    did: list[Ran] = []

    def watch(line: str) -> None:
        if line == f"Running stage '{target}':":
            did.append("ran")
        elif line.startswith(f"Stage '{target}' is cached - skipping run"):
            did.append("restored")
        if not ADVICE.match(line):
            on_line(line)

    finished = stream(["dvc", "repro", "--single-item", target], root, watch, environment)
    if finished.status != 0:
        raise failure(f"Stage `{target}`", finished, root / "artifacts" / target.partition("@")[2])
    return StageOutcome(target, did[-1] if did else "unchanged", time.monotonic() - started)


def failure(what: str, finished: Finished, artifacts: Path | None = None) -> FlawsmithError:
    """The error of a `dvc` or `flawsmith` that failed, by its last words; `artifacts` is where a verdict may lie.

    An exit status that DVC reports of its stage counts for more than DVC's own.
    """
    reported = [match for line in finished.lines if (match := re.search(r", exited with (-?\d+)$", line))]
    status = int(reported[-1].group(1)) if reported else finished.status
    own = [line for line in finished.lines if line.startswith("flawsmith: ")]
    errors = _errors(finished.lines)
    if status < 0 or FIRST_SIGNAL <= status < 255:
        number = -status if status < 0 else status - FIRST_SIGNAL
        return InfrastructureError(f"{what} was killed by signal {number} (out of memory, or stopped from outside).")
    said = own[-1].removeprefix("flawsmith: ") if own else " ".join(errors or list(finished.lines[-1:]))
    sentence = f"{what} failed: {said.strip() or f'exit status {status}, and not a word'}"
    if own and own[-1].startswith(UNEXPECTED):
        return InfrastructureError(sentence)
    if own and (STORE_DOWN in own[-1] or DISK_FULL in own[-1]):
        return InfrastructureError(sentence)
    if reported or not errors:
        if status == UserError.exit_code:
            return UserError(sentence)
        verdict = _verdict(artifacts)
        if status == QualityGateError.exit_code and "`validate@" in what and verdict is not None:
            return GateFailed(sentence, verdict)
        return FlawsmithError(sentence)
    # DVC itself gave up
    text = "\n".join(finished.lines)
    if "Can't remove the following unsaved files" in text:
        return UserError(f"{sentence} Files were changed here that DVC has not stored; `dvc add` or `dvc commit` them.")
    return InfrastructureError(sentence) if INFRASTRUCTURE.search(text) else FlawsmithError(sentence)


def _errors(lines: Sequence[str]) -> list[str]:
    """What DVC says from its first error on, without its advice."""
    first = next((number for number, line in enumerate(lines) if line.startswith("ERROR: ")), len(lines))
    told = [line.removeprefix("ERROR: ").strip() for line in lines[first:]]
    return [line for line in told if line and not line.startswith(("<http", "Having any troubles", "Is your cache"))]


def _verdict(artifacts: Path | None) -> dict[str, Any] | None:
    path = artifacts / "validate" / "verdict.json" if artifacts else None
    if path is None or not path.is_file():
        return None
    verdict = read_json(path)
    return verdict if isinstance(verdict, dict) and verdict.get("passed") is False else None


def has_remote(root: Path) -> bool:
    """Whether a default DVC remote is configured."""
    finished = stream(["dvc", "config", "core.remote"], root, lambda line: None)
    return finished.status == 0 and any(line.strip() for line in finished.lines)


def pull(root: Path, category: str, data_root: str, targets: Sequence[str], on_line: OnLine, remote: bool) -> None:
    """Bring the category's data into the checkout, and those results of its stages that dvc.lock names.

    Data that `dvc add` recorded must come. Results may be missing (never pushed) or stay as they are in the checkout
    (what a stage that failed has left): `dvc repro` then makes them anew.

    Raises:
        UserError: data in the checkout differs from what `dvc add` recorded.
        InfrastructureError, FlawsmithError: it did not come.
    """
    data = f"{data_root}/{category}.dvc"
    if (root / data).is_file():
        run(["dvc", "pull" if remote else "checkout", data], root, on_line)
    if remote:
        finished = stream(["dvc", "fetch", "--run-cache", *targets], root, on_line)
        if finished.status != 0 and not _incomplete(finished):
            raise failure("`dvc fetch`", finished)
    # DVC's run cache leaves out every stage with an output that git keeps (`cache: false`), so a checkout with the
    # lock of another one would compute those again without this.
    locked = _lock(root)
    if known := [target for target in targets if target in locked]:
        stream(["dvc", "checkout", "--allow-missing", *known], root, on_line)


def locked_stages(root: Path, data_root: str) -> tuple[LockedStage, ...]:
    """The stages that dvc.lock holds. Of what they read, images and results are content; the rest is code.

    Raises:
        UserError: dvc.lock cannot be read.
    """
    lock = _lock(root)
    made = [entry["path"] for stage in lock.values() for entry in stage.get("outs", [])]

    def is_content(artefact: Artefact) -> bool:
        return any(is_below(artefact.path, place) for place in [data_root, "artifacts", *made])

    stages = []
    for target, stage in lock.items():
        name, _, category = target.partition("@")
        read, wrote = ([Artefact(item["path"], str(item.get("md5", ""))) for item in stage.get(kind, [])]
                       for kind in ("deps", "outs"))  # fmt: skip
        stages.append(
            LockedStage(
                name,
                category,
                inputs=tuple(item for item in read if is_content(item)),
                outputs=tuple(wrote),
                code=digest_json({item.path: item.digest for item in read if not is_content(item)}),
                params=digest_json({"params": stage.get("params", {})}),
            )
        )
    return tuple(stages)


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies inside it."""
    return PurePosixPath(path).is_relative_to(folder)


def content_digest(path: Path) -> str:
    """The digest of a file or folder as dvc.lock has it. A folder's is that of the list of its files."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        entries = [{"md5": content_digest(file), "relpath": name} for name, file in sorted(files.items())]
        return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def changed(root: Path, targets: Sequence[str]) -> dict[str, str]:
    """The files and folders that are there and are no longer what dvc.lock says of these stages, with the stage.

    Raises:
        UserError, FlawsmithError: DVC cannot say.
    """
    command = ["dvc", "--wait-for-lock", "status", "--json", *targets]
    finished = stream(command, root, lambda line: None, keep_stdout=True)
    if finished.status != 0:
        raise failure("`dvc status`", finished)
    found: dict[str, str] = {}
    for kind in ("changed outs", "changed deps"):  # who made it is named, else who read it
        for target, entries in json.loads(finished.stdout).items():
            for entry in entries:
                states = entry.get(kind, {}) if isinstance(entry, dict) else {}
                for path, state in states.items():
                    if state == "modified":
                        found.setdefault(path, target)
    return found


def _lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock, by their targets."""
    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text())["stages"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); `git checkout dvc.lock`.") from error


def _incomplete(finished: Finished) -> bool:
    """The remote answered, and lacked something; not so if the network failed."""
    return not INFRASTRUCTURE.search("\n".join(finished.lines))


def push(root: Path, category: str, data_root: str, targets: Sequence[str], on_line: OnLine) -> None:
    """Send the category's data and results to the default remote, with the run cache for the other checkouts.

    Raises:
        InfrastructureError, FlawsmithError: they did not arrive.
    """
    data = f"{data_root}/{category}.dvc"
    added = [data] if (root / data).is_file() else []
    run(["dvc", "push", "--run-cache", *added, *targets], root, on_line)


def run(command: Sequence[str], root: Path, on_line: OnLine) -> None:
    """Run a command of DVC's; raises as `push`."""
    finished = stream(command, root, on_line)
    if finished.status != 0:
        raise failure(f"`{' '.join(command[:3])}`", finished)


def lock_digest(root: Path) -> str | None:
    """SHA-256 of dvc.lock: which results this checkout holds. None if nothing has run yet."""
    path = root / "dvc.lock"
    return digest_file(path) if path.is_file() else None


def publish(root: Path, category: str, data_root: str, branch: str, message: str) -> str | None:
    """Commit dvc.lock and the category's small results to a branch; the work tree and the index stay as they are.

    The commit is the checked-out revision plus these files, so that `git checkout` of the branch and `dvc pull` give
    the whole state. The branch is pushed if the git remote `origin` exists.

    Returns:
        The new commit, or None if the branch already says all that.

    Raises:
        UserError: git is missing or `root` is no repository with a commit, or the branch is checked out.
        InfrastructureError: the push failed.
    """
    reference = f"refs/heads/{branch}"
    head = run_git(root, "rev-parse", "HEAD")
    if run_git(root, "symbolic-ref", "--quiet", "HEAD", fails=True) == reference:
        raise UserError(f"Branch `{branch}` is checked out here, so it cannot be published to; name another one.")
    tip = run_git(root, "rev-parse", "--quiet", "--verify", f"{reference}^{{commit}}", fails=True)
    candidates = [Path("dvc.lock"), Path(data_root, f"{category}.dvc"), *small_outputs(root, category)]
    paths = [str(path) for path in candidates if (root / path).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        run_git(root, "read-tree", head, environment=index)
        run_git(root, "update-index", "--add", "--", *paths, environment=index)
        tree = run_git(root, "write-tree", environment=index)
    if tip and tree == run_git(root, "rev-parse", f"{tip}^{{tree}}"):
        return None
    parents = [tip] if tip else []
    if not tip or run_git(root, "merge-base", head, tip, fails=True) != head:
        parents.append(head)
    options = [text for parent in parents for text in ("-p", parent)]
    commit = run_git(root, "commit-tree", tree, *options, "-m", message)
    run_git(root, "update-ref", "-m", message, reference, commit, tip)  # an empty old value: must not exist yet
    if run_git(root, "remote", "get-url", "origin", fails=True):
        try:
            run_git(root, "push", "--quiet", "origin", f"{reference}:{reference}")
        except UserError as error:
            raise InfrastructureError(f"Branch `{branch}` could not be pushed to origin: {error}") from error
    return commit

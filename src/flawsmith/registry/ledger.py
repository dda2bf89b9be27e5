"""The trail of decisions on one registered model, and who is champion by it: pure replay of numbered entries.

MLflow moves an alias without asking what it pointed to, so two promotions at once would both win and one silently.
Here each decision is first appended to a trail whose entries the store numbers atomically, and a change of champion
names the last change that it knew (`previous`). Replayed in order, a change whose `previous` is no longer the last one
lost the race: everyone who reads the trail comes to the same verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["promotion", "refusal", "rollback"]


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
        number: its place in the trail, from 1; 0 is used for "no entry".
        kind: a `promotion` or `rollback` changes the champion, a `refusal` keeps it.
        version: the model version that the decision is about (for a rollback: the one that is champion again).
        digest: SHA-256 of that version's model.onnx.
        previous: number of the last change that the author knew; 0 if none.
        previous_champion: the version that was champion, "" if none.
        previous_digest: its content.
        at: when, as ISO 8601 in UTC.
        actor: who or which run.
        reason: in words.
        run_id: the MLflow run that holds the evidence.
        flow_run: the Prefect flow run, "" if none.
        done: the alias was moved and seen there.
    """

    number: int
    kind: Kind
    version: str
    digest: str
    previous: int
    previous_champion: str
    previous_digest: str
    at: str
    actor: str
    reason: str
    run_id: str = ""
    flow_run: str = ""
    done: bool = False


@dataclass(frozen=True)
class Trail:
    """The replayed trail.

    Attributes:
        entries: all of them, oldest first.
        lost: numbers of changes that came too late.
        champions: versions of the champions that a rollback can go back through, the present one last.
        barred: digest → reason, of contents that were rolled back and not promoted again since.
    """

    entries: tuple[Entry, ...]
    lost: frozenset[int] = frozenset()
    champions: tuple[str, ...] = ()
    barred: dict[str, str] = field(default_factory=dict)

    @property
    def last_change(self) -> Entry | None:
        """The newest change that counts."""
        return next((item for item in reversed(self.entries) if self.counts(item)), None)

    @property
    def champion(self) -> str:
        """The version that should carry the alias, "" if there never was one."""
        return self.champions[-1] if self.champions else ""

    def counts(self, entry: Entry) -> bool:
        """Whether an entry is a change of champion that did not lose its race."""
        return entry.kind != "refusal" and entry.number not in self.lost


def replay(entries: Sequence[Entry]) -> Trail:
    """Who is champion after all `entries` (in any order)."""
    ordered = sorted(entries, key=lambda entry: entry.number)
    last, lost = 0, set[int]()
    champions: list[str] = []
    barred: dict[str, str] = {}
    for entry in ordered:
        if entry.kind == "refusal":
            continue
        if entry.previous != last:
            lost.add(entry.number)
            continue
        last = entry.number
        if entry.kind == "rollback":
            barred[entry.previous_digest] = entry.reason or "no reason given"
            if entry.version in champions:
                latest = len(champions) - 1 - champions[::-1].index(entry.version)
                champions = champions[:latest]
        barred.pop(entry.digest, None)
        champions.append(entry.version)
    return Trail(tuple(ordered), frozenset(lost), tuple(champions), barred)

"""The registry compared with a model of it: any commands, refusals, kills, and losses of the database.

After every step the listing equals the model's, every listed version loads, and no unnamed bytes are stored.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapters.catalog.catalog import Part
from adapters.errors import Conflict, InvalidInput, NotFound, SmoloraError
from adapters.expression import MAX_PARTS, Term, parse
from tests.kits.properties import num_examples
from tests.server.api.adapters.registry import NUM_SEEDS, Nursery, Op, Registry, digest_of, write_files

DIGESTS = [digest_of(seed) for seed in range(NUM_SEEDS)]
NAMES = ["a", "b", "mix"]
ALIASES = ["prod", "latest"]

Parts = tuple[Part, ...]


@dataclass
class Entry:
    """A name: each version is its digest, or its parts."""

    kind: str
    versions: dict[int, str | Parts] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    latest: int | None = None
    rolled_back: bool = False  # manually: jobs leave latest where it is
    next_version: int = 1


@dataclass
class Model:
    """API.md in dictionaries."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def after(self, op: Op) -> "Model":
        """Return the model after the command. Raise its refusal."""
        model = copy.deepcopy(self)
        match op["do"]:
            case "upload":
                model.publish(op["name"], "adapter", DIGESTS[op["seed"]])
            case "train":
                number = model.publish(op["name"], "adapter", DIGESTS[op["seed"]], by_job=True)
                if op["alias"] is not None:
                    model.point(op["name"], op["alias"], number)
            case "point":
                model.point(op["name"], op["alias"], op["version"])
            case "unpoint":
                if op["alias"] == "latest":
                    raise Conflict("latest")
                if op["alias"] not in model.entries.get(op["name"], Entry("")).aliases:
                    raise NotFound(op["alias"])
                del model.entries[op["name"]].aliases[op["alias"]]
            case "compose":
                model.compose(op["name"], parse(op["expression"]))
            case "delete":
                model.delete(op["name"], op["version"], op["force"])
        return model

    def refuse_other_kind(self, name: str, kind: str) -> None:
        entry = self.entries.get(name)
        if entry is not None and entry.versions and entry.kind != kind:
            raise Conflict(name)

    def publish(self, name: str, kind: str, what: str | Parts, by_job: bool = False) -> int:
        self.refuse_other_kind(name, kind)
        entry = self.entries.setdefault(name, Entry(kind))
        number = entry.next_version
        entry.kind, entry.next_version = kind, number + 1
        entry.versions[number] = what
        if not (by_job and entry.rolled_back):
            entry.latest, entry.rolled_back = number, False
        return number

    def compose(self, name: str, terms: Sequence[Term]) -> None:
        """A composition equal to the latest version isn't published again."""
        self.refuse_other_kind(name, "composition")
        leaves = self.sum_of(terms)
        entry = self.entries.get(name)
        if entry is None or entry.latest is None or set(entry.versions[entry.latest]) != set(leaves):
            self.publish(name, "composition", leaves)

    def point(self, name: str, alias: str, version: int) -> None:
        entry = self.entries.get(name)
        if entry is None or version not in entry.versions:
            raise NotFound(name)
        if alias == "latest":
            entry.latest, entry.rolled_back = version, version < max(entry.versions)
        else:
            entry.aliases[alias] = version

    def leaves(self, term: Term) -> Parts:
        entry = self.entries.get(term.name, Entry(""))
        if term.alias not in (None, "latest"):
            number = entry.aliases.get(str(term.alias))
        else:
            number = term.version or entry.latest
        if number not in entry.versions:
            raise NotFound(term.name)
        what = entry.versions[number]
        if isinstance(what, str):
            return (Part(term.name, number, what, term.weight),)
        return tuple(Part(p.name, p.version, p.digest, p.weight * term.weight) for p in what)

    def sum_of(self, terms: Sequence[Term]) -> Parts:
        """Sum weights, which are powers of two here, so that floats are exact."""
        leaves = [part for term in terms for part in self.leaves(term)]
        sums: dict[tuple[str, int, str], float] = {}
        for part in leaves:
            key = (part.name, part.version, part.digest)
            sums[key] = sums.get(key, 0.0) + part.weight
        kept = tuple(Part(*key, weight) for key, weight in sums.items() if weight)
        by_digest: dict[str, float] = {}
        for part in kept:
            by_digest[part.digest] = by_digest.get(part.digest, 0.0) + part.weight
        if len(kept) > MAX_PARTS or any(abs(part.weight) > 100 for part in leaves) or not any(by_digest.values()):
            raise InvalidInput.of("expression", "")
        return kept

    def delete(self, name: str, version: int | None, force: bool) -> None:
        entry = self.entries.get(name, Entry(""))
        doomed = set(entry.versions) if version is None else {version} & set(entry.versions)
        if not doomed:
            raise NotFound(name)
        held_by_alias = doomed & set(entry.aliases.values())
        parts = [
            p
            for e in self.entries.values()
            for what in e.versions.values()
            if isinstance(what, tuple)
            for p in what
        ]
        if (held_by_alias and not force) or any(p.name == name and p.version in doomed for p in parts):
            raise Conflict(name)
        entry.aliases = {alias: number for alias, number in entry.aliases.items() if number not in doomed}
        for number in doomed:
            del entry.versions[number]
        if entry.latest not in entry.versions:
            entry.latest = max(entry.versions, default=None)
        if entry.latest == max(entry.versions, default=None):
            entry.rolled_back = False

    def without_database(self) -> "Model":
        """Return what can be rebuilt: aliases and positions of latest are lost."""
        model = copy.deepcopy(self)
        for entry in model.entries.values():
            entry.aliases, entry.rolled_back = {}, False
            entry.latest = max(entry.versions, default=None)
        return model

    @property
    def digests(self) -> set[str]:
        found = (what for entry in self.entries.values() for what in entry.versions.values())
        return {what for what in found if isinstance(what, str)}

    def listing(self) -> dict[str, object]:
        return {
            name: (entry.kind, entry.latest, entry.aliases, entry.versions)
            for name, entry in self.entries.items()
            if entry.versions
        }


def listing_of(registry: Registry) -> dict[str, object]:
    return {
        adapter.name: (
            adapter.kind,
            adapter.latest,
            dict(adapter.aliases),
            {version.version: version.parts or version.digest for version in adapter.versions},
        )
        for adapter in registry.catalog.list()
    }


names = st.sampled_from(NAMES)
seeds = st.integers(0, NUM_SEEDS - 1)
versions = st.integers(1, 5)
terms = st.builds(
    Term,
    names,
    version=st.none() | st.none() | versions,
    weight=st.sampled_from([1.0, 0.5, -0.25, 2.0, -1.0]),
)
expressions = st.lists(terms, min_size=1, max_size=3).map(lambda found: "+".join(map(str, found)))
ops = st.one_of(
    st.fixed_dictionaries({"do": st.just("upload"), "name": names, "seed": seeds}),
    st.fixed_dictionaries(
        {"do": st.just("train"), "name": names, "seed": seeds, "alias": st.sampled_from([None, "prod"])}
    ),
    st.fixed_dictionaries(
        {"do": st.just("point"), "name": names, "alias": st.sampled_from(ALIASES), "version": versions}
    ),
    st.fixed_dictionaries({"do": st.just("unpoint"), "name": names, "alias": st.sampled_from(ALIASES)}),
    st.fixed_dictionaries({"do": st.just("compose"), "name": names, "expression": expressions}),
    st.fixed_dictionaries(
        {"do": st.just("delete"), "name": names, "version": st.none() | versions, "force": st.booleans()}
    ),
)


class RegistryMachine(RuleBasedStateMachine):
    """A state machine. `files` and `nursery` are set by the test."""

    files: Path
    nursery: Nursery

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self.home = Path(self._scratch.name)
        self.model = Model()
        self.registry = Registry(self.home, self.files)
        self.num_jobs = 0

    def teardown(self) -> None:
        self.registry.close()
        self._scratch.cleanup()

    @rule(op=ops)
    def do(self, op: dict[str, Any]) -> None:
        op = self.numbered(op)
        try:
            after = self.model.after(op)
        except SmoloraError as error:
            with pytest.raises(type(error)):
                self.registry.do(op)
        else:
            self.registry.do(op)
            self.model = after

    @rule(op=ops, step=st.integers(1, 45))
    def be_killed(self, op: dict[str, Any], step: int) -> None:
        """The command was done or not, as it had no answer; what was acknowledged before stays."""
        op = self.numbered(op)
        try:
            after = self.model.after(op)
        except SmoloraError:
            return
        self.registry.close()
        done = self.nursery.do(self.home, op, step)
        self.start_again()
        found = listing_of(self.registry)
        if done or found == after.listing():
            self.model = after
        assert found == self.model.listing()

    @rule()
    def restart(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        self.registry.close()
        self.registry = Registry(self.home, self.files)
        self.registry.restart()

    @rule()
    def lose_the_database(self) -> None:
        self.registry.lose_database()
        self.registry = Registry(self.home, self.files)
        self.registry.restart()
        self.model = self.model.without_database()

    @invariant()
    def the_listing_is_the_models(self) -> None:
        assert listing_of(self.registry) == self.model.listing()

    @invariant()
    def every_version_loads_and_nothing_unnamed_stays(self) -> None:
        assert set(self.registry.store.digests()) == self.model.digests
        for digest in self.model.digests:
            self.registry.store.verify(digest)
        assert self.registry.store.leftovers() == []

    def numbered(self, op: dict[str, Any]) -> dict[str, Any]:
        """Give each job its own id."""
        self.num_jobs += 1
        return op | {"job": f"job-{self.num_jobs}"} if op["do"] == "train" else op


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    write_files(directory)
    return directory


@pytest.fixture(scope="module")
def nursery(files: Path) -> Iterator[Nursery]:
    nursery = Nursery(files)
    yield nursery
    nursery.close()


@pytest.mark.hypothesis
def test_registry_equals_its_model(files: Path, nursery: Nursery) -> None:
    class Machine(RegistryMachine):
        pass

    Machine.files, Machine.nursery = files, nursery
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=num_examples(10), stateful_step_count=25, deadline=None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("op", ["upload", "train", "compose", "delete"])
def test_killed_at_every_step(op: str, files: Path, nursery: Nursery, tmp_path: Path) -> None:
    """At each step of one command in turn, until it is completed before its death."""
    chosen: dict[str, dict[str, Any]] = {
        "upload": {"do": "upload", "name": "a", "seed": 1},
        "train": {"do": "train", "name": "a", "seed": 1, "alias": "prod", "job": "job-1"},
        "compose": {"do": "compose", "name": "mix", "expression": "a*0.5+b"},
        "delete": {"do": "delete", "name": "b", "version": None, "force": True},
    }
    outcomes = set()
    for step in range(1, 200):
        home = tmp_path / str(step)
        registry = Registry(home, files)
        model = Model()
        for name, seed in (("a", 0), ("b", 2), ("b", 3)):
            before: dict[str, Any] = {"do": "upload", "name": name, "seed": seed}
            registry.do(before)
            model = model.after(before)
        registry.close()
        done = nursery.do(home, chosen[op], step)
        registry = Registry(home, files)
        registry.restart()
        found, after = listing_of(registry), model.after(chosen[op])
        assert found in ([after.listing()] if done else [model.listing(), after.listing()])
        outcomes.add((done, found == after.listing()))
        model = after if found == after.listing() else model
        assert set(registry.store.digests()) == model.digests
        assert registry.store.leftovers() == []
        for digest in model.digests:
            registry.store.verify(digest)
        registry.lose_database()
        registry = Registry(home, files)
        registry.restart()
        assert listing_of(registry) == model.without_database().listing()
        registry.close()
        if done:
            break
    assert (False, False) in outcomes
    assert (True, True) in outcomes

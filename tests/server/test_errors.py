"""Errors are sent between processes: every class of the hierarchy, with all its data."""

import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import adapters
import server
from adapters.errors import FieldError, InvalidInput, SmoloraError
from server.engine.request import SequenceOutput
from server.errors import EngineDead, TryAgain

EXTRA = ("obstore", "psycopg", "ray", "triton")
"""Packages of the extra `cluster`, and of torch's builds for GPUs. Modules that need them define no error."""

FIELDS = (FieldError(("adapters", 3, "name"), "isn't one"), FieldError(("prompt",), "is empty: “äöü”"))
ARGUMENTS: dict[str, Any] = {
    "errors": FIELDS,
    "message": "it is so",
    "num_more": 0,
    "retry_after": 2.5,
    "headers": {"x-ratelimit-limit-requests": "2"},
    "reason": "queue",
}
"""Arguments of the constructors, by parameter name."""


def imported(name: str) -> None:
    """Import the module, if its dependencies are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in EXTRA:
                raise


def tree() -> list[type[SmoloraError]]:
    """Return all subclasses, wherever they are defined."""
    for package in (adapters, server):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", "migrations.env")):
                imported(module.name)

    def below(kind: type[SmoloraError]) -> Iterator[type[SmoloraError]]:
        yield kind
        for sub in kind.__subclasses__():
            yield from below(sub)

    return sorted(set(below(SmoloraError)), key=lambda kind: kind.__qualname__)


TREE = tree()


def made(kind: type[SmoloraError]) -> SmoloraError:
    """Make an error with real arguments. A constructor of its own needs values in ARGUMENTS."""
    if "__init__" not in {name for cls in kind.__mro__[: kind.__mro__.index(SmoloraError)] for name in vars(cls)}:
        return kind(ARGUMENTS["message"])
    return kind(**{name: ARGUMENTS[name] for name in inspect.signature(kind).parameters})


def sent(error: SmoloraError) -> SmoloraError:
    """Return the error as it is in another process."""
    found = pickle.loads(pickle.dumps(error))
    assert isinstance(found, SmoloraError)
    return found


def assert_same(found: BaseException | None, error: BaseException | None) -> None:
    assert type(found) is type(error)
    if error is not None and found is not None:
        assert str(found) == str(error)
        assert found.args == error.args
        assert vars(found) == vars(error)


def test_every_error_class_is_listed() -> None:
    assert {"InvalidInput", "InvalidExpression", "QueueFull", "StartupError", "ContextTooLong"} <= {
        kind.__name__ for kind in TREE
    }


@pytest.mark.parametrize("copied", [sent, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", TREE)
def test_every_error_can_be_sent(kind: type[SmoloraError], copied: Callable[[SmoloraError], SmoloraError]) -> None:
    error = made(kind)
    error.add_note("a note")
    found = copied(error)
    assert found is not error
    assert_same(found, error)
    assert found.__notes__ == ["a note"]
    if isinstance(error, InvalidInput):
        assert isinstance(found, InvalidInput)
        assert found.errors == FIELDS
        assert str(found) == "adapters.3.name: isn't one; prompt: is empty: “äöü”"
    if isinstance(error, TryAgain):
        assert isinstance(found, TryAgain)
        assert found.retry_after == 2.5


@pytest.mark.parametrize("kind", TREE)
def test_cause_is_sent_with_the_error(kind: type[SmoloraError]) -> None:
    cause = InvalidInput.of("prompt", "was not one")
    cause.__cause__ = FileNotFoundError(2, "No such file", "x")
    error = made(kind)
    error.__cause__ = cause
    found = sent(error)
    assert_same(found, error)
    assert_same(found.__cause__, cause)
    assert found.__cause__ is not None
    assert isinstance(found.__cause__.__cause__, FileNotFoundError)
    assert found.__cause__.__cause__.filename == "x"


def test_foreign_causes_are_sent_as_text() -> None:
    """Not all causes can be sent; the error itself always can."""
    error = EngineDead()
    try:
        json.loads("{")
    except json.JSONDecodeError as fault:
        error.__cause__ = fault
    found = sent(error)
    assert_same(found, error)
    assert str(found.__cause__) == f"JSONDecodeError: {error.__cause__}"


def test_news_of_a_request_can_be_sent() -> None:
    news = SequenceOutput("r", 1, "", 0, 4, 0, finish_reason="abort", error=InvalidInput(FIELDS))
    found: SequenceOutput = pickle.loads(pickle.dumps(news))
    assert found.finish_reason == "abort"
    assert_same(found.error, news.error)

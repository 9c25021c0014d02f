"""The conformance kit in a package's own tests, one test per backend, precision and check:

    @pytest.mark.conformance("algorithm", "reinforce")
    def test_conformance(conformance):
        conformance()

The mark also takes ``backends``, ``precisions``, ``overrides`` and ``like``, as `lockstep check` does. pytest loads this
module in every environment with Lockstep, so it imports nothing from Lockstep before a test needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

MARK = "conformance(kind, name, backends=None, precisions=None, overrides=(), like=None): the checks of a Lockstep component"
SUBJECTS = pytest.StashKey[dict[Any, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)
    config.stash[SUBJECTS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per (place, check)."""
    if "conformance" not in metafunc.fixturenames:
        return
    from lockstep.checking.conformance.kit import checks
    from lockstep.errors import LockstepError

    if (mark := metafunc.definition.get_closest_marker("conformance")) is None:
        raise pytest.Collector.CollectError(
            f'{metafunc.function.__name__} names no component. Put @pytest.mark.conformance("algorithm", "NAME") above it.'
        )
    try:
        wanted = _Wanted(*mark.args, **mark.kwargs)
        where = wanted.places()
    except (LockstepError, TypeError) as error:
        raise pytest.Collector.CollectError(f"{type(error).__name__}: {error}") from error
    cases = [(wanted, place, check) for place in where for check in checks(wanted.kind)]
    ids = ["-".join(filter(None, [place.backend, place.precision, check.name])) for _, place, check in cases]
    metafunc.parametrize("conformance", cases, ids=ids, indirect=True)


@pytest.fixture
def conformance(request: pytest.FixtureRequest) -> Callable[[], None]:
    """A function that runs the check; the test passes, fails or is skipped accordingly. With -vv, an unexpected error is shown
    with its traceback."""
    wanted, place, check = request.param

    def run() -> None:
        from lockstep.checking.conformance.kit import conform
        from lockstep.checking.conformance.report import explain

        subject = wanted.subject(place, request.config.stash[SUBJECTS])
        (outcome,) = conform(wanted.kind, subject, only=lambda each: each is check)
        if outcome.status == "inapplicable":
            pytest.skip(outcome.detail)
        if outcome.status == "failed":
            pytest.fail("\n".join(explain(outcome, request.config.get_verbosity() > 1)), pytrace=False)

    return run


class _Wanted:
    """The mark's arguments."""

    def __init__(
        self,
        kind: str,
        name: str,
        *,
        backends: Sequence[str] | None = None,
        precisions: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        like: str | None = None,
    ):
        self.kind, self.name, self.backends, self.precisions = kind, name, backends, precisions
        self.overrides, self.like = tuple(overrides), like

    def places(self) -> list[Any]:
        from lockstep.checking.conformance.report import check_overrides, kind_of, places

        check_overrides(self.overrides)
        return places(kind_of(self.name, self.kind), self.name, self.backends, self.precisions)

    def subject(self, place: Any, made: dict[Any, Any]) -> Any:
        """The subject, made once for each place and shared by its checks."""
        from lockstep.checking.conformance.report import made as make

        key = (self.kind, self.name, place, self.overrides, self.like)
        if key not in made:
            made[key] = make(self.kind, self.name, place, self.overrides, self.like)
        return made[key]

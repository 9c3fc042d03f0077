"""Each fault of mutations.py, planted in the real code, is caught by the test that is named for it.

    pytest -m details           this, and the ledger of the paper's details (test_details.py)

A test that passes with its fault in is a test that proves nothing; a fault whose line is gone fails here as well.
"""

import contextlib
import io

import pytest
from mutations import FLIGHT, MUTATIONS, SECOND
from planting import ROOT, Mutation, planted

from nanorlhf.errors import UserError

pytestmark = pytest.mark.details


class Recorder:
    """A pytest plugin that keeps the exception of each failed test, and counts the passed ones."""

    def __init__(self):
        self.failures, self.passed = [], 0

    def __str__(self) -> str:
        return f"{self.passed} passed\n" + "\n".join(str(failure.getrepr(style="short")) for failure in self.failures)

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None:
            self.failures.append(call.excinfo)
        elif call.when == "call":
            self.passed += 1


def run(test: str) -> Recorder:
    """Run one test (all its cases, or those whose id begins as given) in a pytest of its own, in this process."""
    recorder = Recorder()
    file, name = test.split("::")
    name, _, case = name.partition("[")
    select = ["-k", f"{name} and {case}"] if case else []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(
            [str(ROOT / "tests" / f"{file}::{name}"), *select, "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
             "-p", "no:faulthandler", "-p", "no:unraisableexception", "--rootdir", str(ROOT)],
            plugins=[recorder],
        )  # fmt: skip
    return recorder


@pytest.fixture(scope="module")
def when_healthy():
    """What a test says without a fault, each asked once."""
    known = {}

    def found(test: str) -> Recorder:
        if test not in known:
            known[test] = run(test)
        return known[test]

    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_fault_is_caught_by_the_test_named_for_it(mutation, when_healthy):
    healthy = when_healthy(mutation.test)
    assert healthy.passed and not healthy.failures, f"{mutation.test}, without any fault: {healthy}"
    with planted(mutation):
        found = run(mutation.test)
    assert found.failures, f"{mutation.test} passes with {mutation.name} planted: it does not guard that line"
    says_so = (UserError,) if mutation.test in (FLIGHT, SECOND) else (AssertionError, pytest.fail.Exception, UserError)
    for failure in found.failures:  # an assertion or the pre-flight, not a crash
        assert failure.errisinstance(says_so), failure.exconly()


def test_there_are_as_many_faults_as_the_project_says_and_no_two_have_one_name():
    assert len(MUTATIONS) >= 40
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_fault_whose_line_is_gone_fails():
    gone = Mutation("gone", "", "nanorlhf/ppo.py", "no such line", "", "")
    with pytest.raises(AssertionError, match="0 times, expected once"), planted(gone):
        pass


def test_a_fault_is_out_again_after_its_block():
    from nanorlhf.optim import linear_lr

    (fault,) = (mutation for mutation in MUTATIONS if mutation.name == "linear_off_by_one")
    with planted(fault):
        assert linear_lr(0, 10, 1.0) == 0.9  # the function that was imported before
    assert linear_lr(0, 10, 1.0) == 1.0

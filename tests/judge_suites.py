"""The suites that others wrote for arrays like ours, run on ours: the array API's and xarray's for duck arrays.

`python tests/judge_suites.py CHECKOUT [numpy|torch|jax …]`, where CHECKOUT is a clone of data-apis/array-api-tests with
its submodule (needs pytest-json-report and ndindex) or of xarray-contrib/xarray-array-testing; neither is on a package
index. Each example that hypothesis makes is right, refused (an error that says what to do instead) or wrong, and so is
each test; what the namespace lacks is listed by name. On numpy all arrays are wrapped, the wide ones too, which by
themselves would be numpy's own. EXAMPLES in the environment is how many are made for each test (default 20).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from judge_arrays import DTYPES, WAYS

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.backends.numpy import NumpyBackend
from ckptlab.arrays.dtypes import is_narrow, seen
from ckptlab.arrays.duck import Duck, duck, namespace
from ckptlab.arrays.taught import teach

EXAMPLES = int(os.environ.get("EXAMPLES", "20"))
OURS = (
    *WAYS,
    "cannot be written to",
    "move one to the other's",
    " makes a new array here",
    "ckptlab.to(",
    ".array is ",
)
LEFT_OUT = (  # what no labelled array is asked: names of parameters, what a library can do, its table of devices
    "test_signatures.py",
    "test_inspection_functions.py",
    "test_dlpack.py",
)
THEIRS = re.compile(  # where numpy by itself is not the standard, or a library at the infinities of complex numbers
    r"test_broadcast_arrays|test_meshgrid|test_finfo"  # a tuple for a list; numbers that are no Python floats
    r"|test_can_cast"  # the suite takes None for float64, as numpy does
    r"|floor_?div.*infinity|test_unary.*real\(x_i\)"
)
_ABSENT = re.compile(
    r"(?:^|Error: )(\w+) is not defined in|missing the .*?(\w+)(?:\(\))?$|has no function '(\w+)'",
    re.MULTILINE,
)


class Wrapped(NumpyBackend):
    """numpy, whose arrays of 32 bits and more are wrapped too: what is judged is ours."""

    def is_safe(self, array: Any) -> bool:
        return False


def judged(name: str) -> Backend:
    return Wrapped() if name == "numpy" else resolve(name)


class Record:
    """What became of each test and of its examples: a plugin of pytest."""

    def __init__(self) -> None:
        self.right, self.refused = 0, 0  # examples
        self.tests: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.absent: set[str] = set()
        self.wrong: dict[str, str] = {}
        self._of_test: Counter[tuple[str, str]] = Counter()  # (test, "right" or "refused") → examples

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        hypothesis.settings.register_profile(
            "judged",
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.settings.load_profile("judged")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seen_tests = set()
        for item in items:
            handle = getattr(getattr(item.obj, "__func__", item.obj), "hypothesis", None)
            if handle is not None and id(handle) not in seen_tests:
                seen_tests.add(id(handle))
                handle.inner_test = self._counted(handle.inner_test)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._running = item.nodeid

    def _counted(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """The test, whose refused examples are counted and given up: what else there is goes on."""

        @wraps(test)
        def one(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                if _ABSENT.search(str(error)) or (reason := _refusal(error)) is None:
                    raise
                self.refused += 1
                self.reasons[reason] += 1
                self._of_test[self._running, "refused"] += 1
                if self._of_test[self._running, "refused"] > EXAMPLES and not self._of_test[self._running, "right"]:
                    raise
                hypothesis.reject()
            self.right += 1
            self._of_test[self._running, "right"] += 1

        return one

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        error = call.excinfo.value if call.excinfo else None
        if report.when == "call" or report.outcome == "failed":
            self._told(item.nodeid.partition(".py::")[2], item.nodeid, error, report.outcome)
        return report

    def _told(self, label: str, node: str, error: BaseException | None, outcome: str) -> None:
        if error is None or outcome == "skipped":
            partly = "partly refused" if self._of_test[node, "refused"] else "right"
            kind = "left out" if outcome == "skipped" else partly
            self.tests[kind] += 1
        elif found := _ABSENT.search(str(error)):
            self.tests["absent"] += 1
            self.absent.add(found[1] or found[2] or found[3])
        elif isinstance(error, hypothesis.errors.Unsatisfiable) and self._of_test[node, "refused"]:
            self.tests["refused"] += 1
        elif (reason := _refusal(error)) is not None:
            self.tests["refused"] += 1
            self.reasons[reason] += 1
        elif THEIRS.search(label):
            self.tests["as the library"] += 1
        else:
            self.tests["wrong"] += 1
            self.wrong[label] = f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
    return next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)[:230]


def _refusal(error: BaseException) -> str | None:
    """What we say instead of an answer, as far as the error is ours; None if it is not."""
    if isinstance(error, BaseExceptionGroup):
        found = [_refusal(e) for e in error.exceptions]
        return found[0] if all(found) else None
    for cause in (error, error.__cause__, error.__context__):
        ours = not isinstance(cause, AssertionError) or str(cause).startswith("Unexpected exception")
        if cause is not None and ours and any(way in str(cause) for way in OURS):
            return _first_line(cause)
    return None


def duck_tests(backend: Backend) -> dict[str, type]:
    """Classes of xarray-array-testing for arrays of a backend, the narrow dtypes in classes of their own."""
    import xarray.testing.strategies as xrst
    from xarray_array_testing import creation, indexing, reduction

    teach()

    def same(a: Any, b: Any) -> None:
        first, second = (np.asarray(x) for x in (a, b))
        assert first.dtype == second.dtype
        wide = [x.astype(np.float64) if is_narrow(x.dtype) else x for x in (first, second)]
        np.testing.assert_allclose(*wide, rtol=1e-5)

    def same_places(self: Any, a: Any, b: Any) -> None:
        """A place in all dims is numpy's, whatever the array: it is no data."""
        places = [x if isinstance(x, dict) else {"": x} for x in (a, b)]
        assert places[0].keys() == places[1].keys()
        for dim, place in places[0].items():
            np.testing.assert_array_equal(np.asarray(place), np.asarray(places[1][dim]))

    def made(dtypes: list[Any]) -> type:
        def arrays(shape: Any, dtype: Any) -> Any:
            """Without NaN, which xarray leaves out and the functions that it is compared with do not."""
            plain = np.dtype(dtype)
            low, unit = (0, 1) if plain.kind == "u" else (-4, 1) if plain.kind == "i" else (-4, 0.5)
            drawn = npst.arrays(np.int8, shape, elements=st.integers(low, 4))
            return drawn.map(lambda x: duck(backend.from_numpy((x * unit).astype(plain)), backend))

        return type(
            "Ours",
            (),
            {
                "xp": namespace(backend),
                "array_type": staticmethod(lambda op: (Duck, np.ndarray) if backend.name == "numpy" else Duck),
                "array_strategy_fn": staticmethod(arrays),
                "assert_equal": staticmethod(same),
                "assert_dimension_indexers_equal": same_places,
                "dtypes": dtypes,
            },
        )

    class Given:
        """xarray's strategy draws the dtypes of the class that is tested."""

        @pytest.fixture(autouse=True)
        def _given(self, monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.setattr(xrst, "supported_dtypes", lambda: st.sampled_from(self.dtypes))

    every = [*DTYPES.values(), np.dtype(np.complex64), np.dtype(np.complex128)]
    narrow = [seen(d) for d in every if is_narrow(d)]
    wide = [d for d in every if not is_narrow(d) and d.kind != "b"]
    suites = (creation.CreationTests, indexing.IndexingTests, reduction.ReductionTests)
    return {
        f"Test{suite.__name__}{kind}": type(f"Test{suite.__name__}{kind}", (Given, made(dtypes), suite), {})
        for kind, dtypes in (("Wide", wide), ("Narrow", narrow))
        for suite in suites
    }


def main(checkout: str, names: list[str]) -> int:
    """Print what was found; 1 if anything is wrong."""
    backends = names or ["numpy", "torch", "jax"]
    if len(backends) > 1:  # the suites are imported once for each
        return max(subprocess.run([sys.executable, __file__, checkout, name]).returncode for name in backends)
    (name,) = backends
    folder = Path(checkout).resolve()
    sys.path.insert(0, str(folder))
    os.environ.update(JUDGED=name, ARRAY_API_TESTS_MODULE="judge_suites.xp")
    os.environ.setdefault("ARRAY_API_TESTS_VERSION", np.__array_api_version__)
    record, options = (
        Record(),
        ["-q", "-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore"],
    )
    if (folder / "array_api_tests").is_dir():
        os.chdir(folder)
        left = [f"--ignore=array_api_tests/{file}" for file in LEFT_OUT]
        code = pytest.main([*options, f"--max-examples={EXAMPLES}", *left, "array_api_tests"], [record])
    else:
        code = pytest.main([*options, "--noconftest", "-c", os.devnull, __file__], [record])
    print(f"\n{folder.name} on {name}: {', '.join(f'{n:,} tests {kind}' for kind, n in record.tests.most_common())}")
    print(f"  {record.right:,} examples right, {record.refused:,} refused")
    print(f"  absent: {' '.join(sorted(record.absent))}")
    for reason, count in record.reasons.most_common():
        print(f"  refused ({count}): {reason}")
    for label, problem in record.wrong.items():
        print(f"  WRONG {label}: {problem}")
    return 1 if record.wrong or code > 1 or not record.tests else 0


if (_name := os.environ.get("JUDGED")) and __name__ != "__main__":  # as pytest and the suites import it
    xp = namespace(judged(_name))
    xp.__array_namespace_info__ = np.__array_namespace_info__  # of dtypes: ours are numpy's
    if find_spec("xarray_array_testing"):
        globals().update(duck_tests(judged(_name)))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""Which cases of a law the quick suite runs: pairs of model, method and law, not the full product."""

import itertools
from collections import Counter, defaultdict

import pytest
from cases import CASES


def method_of(case):
    return str(case).removeprefix(f"{case.model}-")


def diagonal(names, *values, ids=None, among=None):
    """Return a mark for the product of ``values``; all of it is slow but a diagonal, on which each value comes up.

    With ``among``, the diagonal has these of the first values alone.
    """
    values = [list(each) for each in values]
    longest = max(map(len, values))
    quick = {tuple((i + i // len(each)) % len(each) for each in values) for i in range(longest)}
    quick = {index for index in quick if among is None or values[0][index[0]] in among}
    product = itertools.product(*(range(len(each)) for each in values))
    sets = [(index, [each[i] for each, i in zip(values, index, strict=True)]) for index in product]
    marked = [pytest.param(*one, marks=() if index in quick else pytest.mark.slow) for index, one in sets]
    return pytest.mark.parametrize(names, marked, ids=ids)


class Laws:
    """Gives each law of a file the cases that it applies to; of these all are slow but one of each method and model.

    A law takes those that the laws before it have run least, so that over the laws of a file each case comes up.
    """

    def __init__(self):
        self.cases, self.quick = {}, {}  # by the name of the law
        self._runs = Counter()

    def __call__(self, where=lambda case: True, cases=CASES, every=1):
        """Return a decorator that runs a law over the cases where ``where`` holds.

        With ``every``, one in so many of those that would be quick stays quick: for laws that take long.
        """
        cases = [case for case in cases if where(case)]

        def over_cases(law):
            self.cases[law.__name__], self.quick[law.__name__] = cases, self.sample(cases)[::every]
            quick = set(map(id, self.quick[law.__name__]))
            values = [case if id(case) in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
            return pytest.mark.parametrize("case", values, ids=str)(law)

        return over_cases

    def sample(self, cases):
        """Return one case of each method and of each model."""
        chosen, met = [], Counter()
        for kind in (method_of, lambda case: case.model):
            known = set(map(kind, chosen))
            groups = defaultdict(list)
            for case in cases:
                groups[kind(case)].append(case)
            for name, group in groups.items():
                if name not in known:
                    case = min(group, key=lambda case: (self._runs[str(case)], met[case.model]))
                    self._runs[str(case)] += 1
                    met[case.model] += 1
                    chosen.append(case)
        return chosen

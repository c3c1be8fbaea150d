"""Every searcher against all choices of small problems, and the genetic one against the exact one of large ones."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmbrecq.building import build
from mmbrecq.errors import BudgetError, ConfigError, DependencyError
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.mixed_precision.search.nsga2 import NSGA2Searcher, find_front
from mmbrecq.mixed_precision.search.problem import BitProblem, Cost
from mmbrecq.registry import SEARCHERS

CANDIDATES = ((2, 8), (4, 8), (8, 8))


def random_problem(layers: int, seed: int, share: float, pairs: bool = True, time: float = np.inf) -> BitProblem:
    """Losses fall and sizes grow with the bits, over some orders of magnitude, as in a network.

    Args:
        layers: Their number.
        seed: Of the tables.
        share: Where the budget lies between the least and the largest size.
        pairs: Whether neighbours lose more together at 2 bits; of some, less.
        time: Budget of a second cost that has nothing to do with size.
    """
    draw = np.random.default_rng(seed)
    size = draw.lognormal(0, 1.2, (layers, 1)) * np.array([2.0, 4, 8])
    weight = draw.lognormal(0, 1.5, (layers, 1))
    loss = weight * np.array([1, 0.08, 0.001]) * draw.lognormal(0, 0.3, (layers, 3))
    extra = {}
    for i in range(0, layers - 1, 2) if pairs else ():
        extra[i, i + 1] = np.zeros((3, 3))
        extra[i, i + 1][0, 0] = draw.normal(0.3, 0.3) * weight[i : i + 2].min()
    least, most = size.min(1).sum(), size.max(1).sum()
    costs = {
        'size': Cost(size, least + share * (most - least), unit='bytes'),
        'time': Cost(draw.uniform(0.5, 2, (layers, 3)), time),
    }
    return BitProblem([f'layer{i}' for i in range(layers)], CANDIDATES, loss, extra, costs)


def best_of_all(problem: BitProblem) -> float:
    """The least loss, by looking at every choice."""
    choices = np.array(list(itertools.product(*problem.options)))
    inputs = np.array([second or 0 for _, second in problem.candidates])[choices]
    for tie in problem.ties:
        alike = (inputs[:, tie] == inputs[:, tie[:1]]).all(1)
        choices, inputs = choices[alike], inputs[alike]
    return float(problem.losses(choices[problem.feasible(choices)]).min())


@pytest.mark.parametrize('searcher', ['IntegerProgram', 'GeneticSearcher'])
@pytest.mark.parametrize('pairs', [False, True])
@pytest.mark.parametrize('share', [0.0, 0.1, 0.4, 1.0])
def test_the_best_of_all_choices_is_found(searcher: str, pairs: bool, share: float) -> None:
    for seed in range(3):
        # the smallest choices leave no freedom to be fast as well
        problem = random_problem(7, seed, share, pairs, time=9.0 if share > 0.1 else np.inf)
        found = build(SEARCHERS, {'type': searcher}).search(problem, seed)
        assert problem.feasible(found)
        np.testing.assert_allclose(problem.losses(found), best_of_all(problem), rtol=1e-9)


@pytest.mark.parametrize('searcher', ['IntegerProgram', 'GeneticSearcher'])
def test_only_what_a_layer_may_have_is_chosen(searcher: str) -> None:
    free = random_problem(7, 5, 0.5)
    allowed = np.ones((7, 3), bool)
    allowed[0] = allowed[6] = [False, False, True]
    problem = BitProblem(free.layers, CANDIDATES, free.loss, free.pairs, free.costs, allowed)
    found = build(SEARCHERS, {'type': searcher}).search(problem)
    assert found[[0, 6]].tolist() == [2, 2]
    np.testing.assert_allclose(problem.losses(found), best_of_all(problem), rtol=1e-9)


def tied_problem(layers: int, seed: int, share: float) -> BitProblem:
    """Bits of weights and of activations, some of which two or three layers read; operations cost their product."""
    draw = np.random.default_rng(seed)
    candidates = [(w, a) for w in (2, 4, 8) for a in (4, 8)]
    bits = np.array(candidates, float)
    work = draw.lognormal(0, 1, (layers, 1)) * bits.prod(1)
    weights = draw.lognormal(0, 1.5, (layers, 1)) * np.exp2(-2 * bits[:, 0])
    inputs = draw.lognormal(0, 1.5, (layers, 1)) * np.exp2(-2 * bits[:, 1]) * 8
    extra = {(0, 1): np.outer(bits[:, 0] == 2, bits[:, 0] == 2) * 0.05}
    least = work.min(1).sum()
    costs = {'bitops': Cost(work, least + share * (work.max(1).sum() - least))}
    ties = [[i, i + 1, i + 2][: 2 + i % 2] for i in range(1, layers - 2, 3)]
    return BitProblem([f'layer{i}' for i in range(layers)], candidates, weights + inputs, extra, costs, None, ties)


def assert_tied(problem: BitProblem, choices: np.ndarray) -> None:
    inputs = np.array([second for _, second in problem.candidates])[choices]
    assert problem.ties
    for tie in problem.ties:
        assert (inputs[..., tie] == inputs[..., tie[:1]]).all()


@pytest.mark.parametrize('searcher', ['IntegerProgram', 'GeneticSearcher'])
@pytest.mark.parametrize('share', [0.0, 0.05, 0.2, 0.5, 1.0])
def test_layers_that_read_the_same_values_choose_together(searcher: str, share: float) -> None:
    for seed in range(2):
        problem = tied_problem(6, seed, share)
        found = build(SEARCHERS, {'type': searcher}).search(problem, seed)
        assert_tied(problem, found)
        assert problem.feasible(found)
        np.testing.assert_allclose(problem.losses(found), best_of_all(problem), rtol=1e-9)


def test_the_genetic_search_comes_close_with_activations_too() -> None:
    problem = tied_problem(40, 0, 0.15)
    exact = problem.losses(IntegerProgram().search(problem))
    found = GeneticSearcher().search(problem, 0)
    assert_tied(problem, found)
    assert exact <= problem.losses(found) <= 1.005 * exact


def test_the_front_ties_layers_too() -> None:
    problem = tied_problem(6, 1, 0.5)
    front = NSGA2Searcher(iterations=60).front(problem, 0)
    assert np.array_equal(NSGA2Searcher(iterations=60).search(problem, 0), front[0])
    assert_tied(problem, front)
    np.testing.assert_allclose(problem.losses(front)[0], best_of_all(problem), rtol=1e-9)


@pytest.mark.parametrize('layers', [21, 53])
@pytest.mark.parametrize('pairs', [False, True])
def test_the_genetic_search_comes_close_to_the_exact_solution(layers: int, pairs: bool) -> None:
    for share in np.random.default_rng(0).uniform(0.05, 0.8, 3):
        problem = random_problem(layers, layers, share, pairs)
        exact = problem.losses(IntegerProgram().search(problem))
        found = GeneticSearcher().search(problem, 0)
        assert problem.feasible(found)
        assert exact <= problem.losses(found) <= 1.005 * exact


def test_a_seed_decides_all_draws() -> None:
    problem = random_problem(30, 0, 0.2)
    searcher = GeneticSearcher(iterations=3, refine=False)
    first, again, other = (searcher.search(problem, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_refinement_is_no_worse_than_the_plain_search() -> None:
    losses = {False: 0.0, True: 0.0}
    for refine in losses:
        for seed in range(3):
            problem = random_problem(40, seed, 0.3)
            losses[refine] += float(problem.losses(GeneticSearcher(refine=refine).search(problem, seed)))
    assert losses[True] <= losses[False]


@pytest.mark.parametrize('searcher', ['IntegerProgram', 'GeneticSearcher', 'NSGA2Searcher'])
def test_budgets_that_cannot_be_kept(searcher: str) -> None:
    size = np.array([[1.0, 2], [1, 2]])
    for budgets, message in (((1.9, 9), 'the least cost of these layers and candidates is 2$'), ((3, 3), 'together')):
        costs = {'size': Cost(size, budgets[0]), 'time': Cost(size[:, ::-1].copy(), budgets[1])}
        problem = BitProblem(('a', 'b'), ((2, 8), (8, 8)), np.ones((2, 2)), {}, costs)
        if budgets == (3, 3):
            # each can be kept, and one choice keeps both: one layer small, the other fast
            costs['both'] = Cost(np.array([[1.0, 0], [1, 0]]), 0.5)
            problem = BitProblem(('a', 'b'), ((2, 8), (8, 8)), np.ones((2, 2)), {}, costs)
        made = build(SEARCHERS, {'type': searcher, **({'iterations': 5} if searcher == 'NSGA2Searcher' else {})})
        with pytest.raises(BudgetError, match=message):
            made.front(problem) if searcher == 'NSGA2Searcher' else made.search(problem)


def test_the_front_holds_the_best_for_every_size() -> None:
    problem = random_problem(7, 2, 1.0, time=9.0)
    front = NSGA2Searcher(iterations=60).front(problem, 0)
    assert problem.feasible(front).all()
    losses, sizes, times = problem.losses(front), problem.spent('size', front), problem.spent('time', front)
    assert (np.diff(losses) >= 0).all()
    points = np.stack([losses, sizes, times], 1)
    for point in points:
        assert not ((points <= point).all(1) & (points < point).any(1)).any(), 'another is better in everything'
    for limit in np.quantile(sizes, [0.2, 0.5, 0.8]):
        costs = {**problem.costs, 'size': Cost(problem.costs['size'].table, limit)}
        budget = BitProblem(problem.layers, CANDIDATES, problem.loss, problem.pairs, costs)
        assert losses[sizes <= limit].min() <= 1.02 * best_of_all(budget)
    assert np.array_equal(front, NSGA2Searcher(iterations=60).front(problem, 0))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'scipy', None)
    monkeypatch.setitem(sys.modules, 'pymoo', None)
    with pytest.raises(DependencyError, match=r'scipy is not installed; install it with: pip install "mmbrecq\[search'):
        IntegerProgram()
    with pytest.raises(DependencyError, match=r'pymoo is not installed; install it with: pip install "mmbrecq\[search'):
        NSGA2Searcher()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'type': 'GeneticSearcher', 'population': 0}, 'population of a search to be an integer >= 1, but got 0'),
        ({'type': 'GeneticSearcher', 'mutation': 1.5}, r'mutation of a search to be a number in \(0, 1\], but got 1.5'),
        ({'type': 'GeneticSearcher', 'resampling': -1}, 'resampling of a search to be an integer >= 0, but got -1'),
        ({'type': 'GeneticSearcher', 'generations': 5}, "unknown option 'generations' of GeneticSearcher"),
        ({'type': 'NSGA2Searcher', 'iterations': 1}, 'iterations of a search to be an integer >= 2, but got 1'),
        ({'type': 'NSGA2Searcher', 'mutation': 0}, r'mutation of a search to be a number in \(0, 1\], but got 0'),
        (
            {'type': 'IntegerProgram', 'time_limit': 0},
            r'time_limit of a search to be a number in \(0, inf\], but got 0',
        ),
        ({'type': 'Greedy'}, "unknown searcher type 'Greedy': expected one of GeneticSearcher, IntegerProgram"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SEARCHERS, options)


@pytest.mark.parametrize('tied', [False, True])
def test_no_choice_is_better_than_the_front_of_the_report(tied: bool) -> None:
    problem = tied_problem(6, 3, 0.2) if tied else random_problem(7, 4, 0.2)
    name = 'bitops' if tied else 'size'
    front = find_front(problem, name)
    costs, losses = np.array(front).T
    assert (np.diff(costs) > 0).all() and (np.diff(losses) < 0).all()
    for cost, loss in front:
        budget = replace(problem, costs={name: Cost(problem.costs[name].table, cost)})
        np.testing.assert_allclose(loss, best_of_all(budget), rtol=1e-9)


def test_the_front_of_a_large_network_takes_seconds() -> None:
    problem = random_problem(60, 0, 0.2)
    start = time.perf_counter()
    front = find_front(problem, 'size')
    assert time.perf_counter() - start < 60
    cost, loss = front[len(front) // 2]
    budget = replace(problem, costs={'size': Cost(problem.costs['size'].table, cost)})
    assert loss <= 1.05 * float(budget.losses(IntegerProgram().search(budget)))

"""A few of the damaged banks that `make fuzz` makes by the thousand."""

from __future__ import annotations

import random

import pytest

from support.mutants import Reader, Runner


@pytest.mark.parametrize(("target", "count"), [(Reader, 400), (Runner, 120)])
def test_mutants_are_refused_by_name_or_change_nothing(tmp_path, target, count):
    rng, tested = random.Random(11), target(tmp_path)
    refused = sum(tested.check(rng.randbytes(rng.randint(8, 96))) for _ in range(count))
    assert 0 < refused < count


@pytest.mark.parametrize(("target", "count"), [(Reader, 200), (Runner, 60)])
def test_a_flipped_bit_is_noticed_or_harmless(tmp_path, target, count):
    rng, tested = random.Random(12), target(tmp_path)
    sizes = tested.mutants.sizes()
    for name in rng.choices(list(sizes), k=count):
        refused = tested.check_flip(name, rng.randrange(8 * sizes[name]))
        assert refused or target is Runner

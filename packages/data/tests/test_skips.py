"""Skipped ranges of steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail_data.skips import Skips, fields, merged, parse

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=8)


@given(RANGES, st.integers(0, 30))
def test_steps_are_those_that_are_left_in_order(ranges, step):
    """Many, adjacent, overlapping and unsorted ranges against a filtered list."""
    left = [raw for raw in range(200) if not any(a <= raw < b for a, b in ranges)]
    assert Skips(merged(ranges)).raw(step) == left[step]


@given(RANGES)
def test_the_written_form_is_read_back(ranges):
    """It travels in the fingerprint of every saved state."""
    skips = Skips(merged(ranges))
    assert parse(str(skips)).ranges == skips.ranges
    assert fields(f"a=1 skip={skips}")["skip"] == str(skips)


@pytest.mark.parametrize("bad", [(3, 3), (4, 3), (-1, 2), (1,), (1, 2, 3)])
def test_wrong_ranges_are_refused(bad):
    """A reversed range would leave nothing out, silently."""
    with pytest.raises(ValueError, match="expected"):
        merged([bad])


def test_ranges_are_whole_numbers():
    """Steps given as 1.5 or '3' are a mistake somewhere."""
    with pytest.raises(TypeError):
        merged([(0, 1.5)])

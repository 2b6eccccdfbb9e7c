"""What of a forward a GPU was busy: spans of kernels that lie over each other count once."""

import pytest

from benchmarks.gpu_idle import covered


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0.0),
        ([(0.0, 2.0), (3.0, 4.0)], 3.0),
        ([(3.0, 4.0), (0.0, 2.0)], 3.0),
        ([(0.0, 5.0), (1.0, 2.0), (4.0, 6.0)], 6.0),
        ([(0.0, 1.0), (1.0, 2.0)], 2.0),
    ],
)
def test_the_union_of_spans(spans, length):
    assert covered(spans) == length

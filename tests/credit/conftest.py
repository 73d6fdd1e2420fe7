"""Shapes and dtypes of `rlhf_kit.credit` are checked at run time in these tests."""

import sys

import pytest
import torch
from hypothesis import strategies as st
from jaxtyping import install_import_hook

# An int is a float, as everywhere in Python.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
# Other tests may have imported the package without the checks.
for name in [name for name in sys.modules if name.startswith("rlhf_kit.credit")]:
    del sys.modules[name]
with install_import_hook("rlhf_kit.credit", CHECKER):
    import rlhf_kit.credit
    import rlhf_kit.credit.spans  # noqa: F401


@st.composite
def _batch(draw, channels=1, group_size=1, min_groups=1):
    rows, columns = group_size * draw(st.integers(min_groups, 3)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cells = st.tuples(st.booleans(), *[st.floats(-10, 10, width=32)] * channels)
    drawn = torch.tensor(draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns)))
    mask, *values = drawn.view(rows, columns, -1).unbind(-1)
    mask = mask.bool()
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(rows * columns)[: rows * columns]
    return mask, *[torch.where(mask, value, poison.view(rows, columns)).to(dtype) for value in values]


@pytest.fixture(scope="session")
def batches():
    """Strategy of a ragged (B, T) mask with holes and empty rows, and `channels` tensors of its shape.

    They are float32 or bfloat16, and hold NaN and infinities outside the mask.
    """
    return _batch


@pytest.fixture(scope="session")
def close():
    """Equality of a float32 tensor with numbers worked out in double precision."""

    def check(actual, expected, atol=1e-4):
        assert actual.dtype == torch.float32
        expected = torch.as_tensor(expected, dtype=torch.float32).view(actual.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)

    return check

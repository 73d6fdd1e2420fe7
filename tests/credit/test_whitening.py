import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

import rlhf_kit
from rlhf_kit.credit import whiten


@given(data=st.data(), shift_mean=st.booleans())
def test_whitening_is_by_mean_and_population_variance(batches, close, data, shift_mean):
    mask, values = data.draw(batches())
    entries = values[mask].tolist()
    mean = statistics.fmean(entries) if entries else 0.0
    scale = (statistics.pvariance(entries) + 1e-2) ** 0.5 if entries else 1.0
    expected = torch.zeros(mask.shape)
    for i, t in mask.nonzero().tolist():
        expected[i, t] = (values[i, t].item() - mean) / scale + (0.0 if shift_mean else mean)
    close(whiten(values, mask, shift_mean, eps=1e-2), expected, atol=1e-3)


def test_spread_of_five_becomes_one():
    values = torch.tensor([[-5.0, 5.0], [5.0, -5.0]]) + 2
    whitened = whiten(values, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    kept_mean = whiten(values, torch.ones(2, 2, dtype=torch.bool), shift_mean=False)
    torch.testing.assert_close(kept_mean, torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


def test_the_smallest_spread_about_a_large_mean_survives_float32():
    """Neighbouring float32 numbers: the rounding error of the mean is larger than their spread."""
    values = torch.full((7, 333), 10_000.1)
    values[:, ::4] += 2**-10
    exact = values.double()
    expected = (exact - exact.mean()) / (exact.var(unbiased=False) + 1e-8).sqrt()
    whitened = whiten(values, torch.ones_like(values, dtype=torch.bool))
    torch.testing.assert_close(whitened, expected.float(), atol=1e-4, rtol=0)


def test_equal_values_show_no_spread():
    values = torch.full((7, 999), 12_345.678)
    assert whiten(values, torch.ones_like(values, dtype=torch.bool)).abs().max() < 1e-2


def test_one_value_and_none():
    values = torch.tensor([[3.0, torch.nan]])
    assert whiten(values, torch.tensor([[True, False]])).tolist() == [[0, 0]]
    assert whiten(values, torch.tensor([[False, False]])).tolist() == [[0, 0]]


def test_without_a_process_group_this_process_is_the_only_rank():
    values, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert whiten(values, mask, distributed=True).equal(whiten(values, mask))


def test_whitening_over_ranks(tmp_path):
    """Two gloo processes with other shapes each: the statistics are those of all their action tokens."""
    torch.manual_seed(0)
    big, small = torch.randn(5, 7) * 3 + 40, torch.randn(2, 3) - 9
    big_mask, small_mask = torch.rand(5, 7) > 0.4, torch.tensor([[True, False, True], [False, True, True]])
    big, small = torch.where(big_mask, big, torch.nan), torch.where(small_mask, small, torch.inf)
    none = torch.zeros_like(small_mask)
    cases = [
        [(big, big_mask, True), (big, big_mask, False), (big, big_mask, True)],
        [(small, small_mask, True), (small, small_mask, False), (small, none, True)],
    ]
    for rank, case in enumerate(cases):
        torch.save(case, tmp_path / f"in{rank}.pt")
    worker = Path(__file__).with_name("whiten_on_rank.py")
    source = Path(rlhf_kit.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), "2", tmp_path], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]

    for i, shift_mean in enumerate([True, False, True]):
        parts = [(case[i][0], case[i][1], results[rank][i]) for rank, case in enumerate(cases)]
        entries = [x for values, mask, _ in parts for x in values[mask].tolist()]
        mean, spread = statistics.fmean(entries), statistics.pstdev(entries)
        for values, mask, whitened in parts:
            expected = torch.where(mask, (values.nan_to_num(0) - mean) / spread, 0.0)
            if not shift_mean:
                expected = torch.where(mask, expected + mean, 0.0)
            torch.testing.assert_close(whitened, expected.float(), atol=1e-4, rtol=1e-5)

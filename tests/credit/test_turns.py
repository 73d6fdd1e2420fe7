import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit import place_at_turn_ends, turn_ids


def runs(mask_row):
    """The maximal runs of True, each a list of columns, found one column after the other."""
    found = []
    for t, action in enumerate(mask_row.tolist()):
        if action and (t == 0 or not mask_row[t - 1]):
            found.append([])
        if action:
            found[-1].append(t)
    return found


@given(data=st.data())
def test_turns_are_the_runs_of_action_tokens(batches, data):
    mask, _ = data.draw(batches())
    expected = torch.full(mask.shape, -1)
    for i, row in enumerate(mask):
        for k, columns in enumerate(runs(row)):
            expected[i, columns] = k
    assert turn_ids(mask).equal(expected)


@given(data=st.data())
def test_a_turns_value_lies_on_its_last_token_alone(batches, close, data):
    mask, _ = data.draw(batches())
    values = torch.full((len(mask), mask.shape[1]), torch.nan)
    expected = torch.zeros(mask.shape)
    for i, row in enumerate(mask):
        for k, columns in enumerate(runs(row)):
            values[i, k] = 10 * i + k + 1
            expected[i, columns[-1]] = 10 * i + k + 1
    close(place_at_turn_ends(values, turn_ids(mask)), expected)


def test_turns_by_hand():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0], [0] * 7]).bool()
    turns = turn_ids(mask)
    assert turns.tolist() == [[0, 0, -1, -1, 1, -1, 2], [-1, 0, 0, 0, 0, -1, -1], [-1] * 7]
    values = torch.tensor([[1.0, 2, 3], [4, 9, 9], [9, 9, 9]])
    placed = [[0, 1, 0, 0, 2, 0, 3], [0, 0, 0, 0, 4, 0, 0], [0] * 7]
    assert place_at_turn_ends(values, turns).tolist() == placed


def test_more_turns_than_values_are_refused():
    with pytest.raises(ValueError, match="1 do not fit 1 steps"):
        place_at_turn_ends(torch.zeros(1, 1), turn_ids(torch.tensor([[True, False, True]])))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches(shape):
    turns = turn_ids(torch.zeros(shape, dtype=torch.bool))
    assert turns.shape == shape
    assert place_at_turn_ends(torch.zeros(shape[0], 0), turns).shape == shape

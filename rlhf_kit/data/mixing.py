"""Experience replay: new rows mixed with rows of an older data set (DICE, arXiv 2406.09760, section 3.2)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_kit.data.implicit_prompts import turns_said
from rlhf_kit.data.names import in_common

Row = Mapping[str, Any]


def with_replay(rows: Sequence[Row], replay: Sequence[Row], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """`rows`, and behind them rows of `replay` that make up `share` of the whole, drawn without replacement.

    No drawn row has the prompt of a new one, in whatever form (`turns_said`). Drawn are, for N new rows,
    `round(N * share / (1 - share))`, or as many as there are. The mixture has the columns that both have, and the
    sampled ids of either: they are null in the rows that have none.

    Raises:
        ValueError: the two have no `prompt` or nothing else in common, or every older prompt is also a new one.
    """
    columns = in_common([rows[0], replay[0]])
    if "prompt" not in columns or len(columns) < 2:
        raise ValueError(
            f"the rows have {', '.join(rows[0])}, those to replay {', '.join(replay[0])}: too little alike"
        )
    new = {turns_said(row["prompt"]) for row in rows}
    older = [row for row in replay if turns_said(row["prompt"]) not in new]
    if not older:
        raise ValueError("every prompt of the rows to replay is also a new one: give rows of other prompts")
    count = min(round(len(rows) * share / (1 - share)), len(older))
    drawn = random.Random(f"replay {seed}").sample(range(len(older)), count)
    mixture = [*rows, *(older[number] for number in sorted(drawn))]
    return [{name: row.get(name) for name in columns} for row in mixture]

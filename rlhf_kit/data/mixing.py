"""Experience replay: new rows mixed with rows of an older data set (DICE, arXiv 2406.09760, section 3.2)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def with_replay(rows: Sequence[Row], replay: Sequence[Row], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """`rows`, and behind them rows of `replay` that make up `share` of the whole, drawn without replacement.

    No drawn row has the prompt of a new one. `round(N * share / (1 - share))` are drawn for N new rows, or as many as
    there are. The mixture has the columns that both have.

    Raises:
        ValueError: the two have no `prompt` or nothing else in common, or every older prompt is also a new one.
    """
    columns = [name for name in rows[0] if name in replay[0]]
    if "prompt" not in columns or len(columns) < 2:
        raise ValueError(
            f"the rows have {', '.join(rows[0])}, those to replay {', '.join(replay[0])}: too little alike"
        )
    new = {_key(row) for row in rows}
    older = [row for row in replay if _key(row) not in new]
    if not older:
        raise ValueError("every prompt of the rows to replay is also a new one: give rows of other prompts")
    count = min(round(len(rows) * share / (1 - share)), len(older))
    drawn = random.Random(f"replay {seed}").sample(range(len(older)), count)
    mixture = [*rows, *(older[number] for number in sorted(drawn))]
    return [{name: row[name] for name in columns} for row in mixture]


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)

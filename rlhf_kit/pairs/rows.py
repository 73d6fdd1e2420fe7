"""The rows that are written: pairs, single completions, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_kit.pairs.builder import Row


def with_lineage(rows: Sequence[Row], lineage: Mapping[str, Any]) -> list[Row]:
    """The rows, each with the model, the recipe, the round and the seed that it comes from."""
    return [{**row, **lineage} for row in rows]


def unpaired_rows(paired: Sequence[Row]) -> list[Row]:
    """Each completion of the pairs once, `label` true where it was chosen, in the order of the pairs (KTO's rows).

    A completion that was chosen in one pair and rejected in another of the same prompt is left out. `score`, the
    sampled ids, the length and shares are taken along where the pairs have them.
    """
    sides = [(row, side) for row in paired for side in ("chosen", "rejected")]
    labels: dict[tuple[Any, str], set[bool]] = {}
    for row, side in sides:
        labels.setdefault(_identity(row, side), set()).add(side == "chosen")
    written: dict[tuple[Any, str], Row] = {}
    for row, side in sides:
        identity = _identity(row, side)
        if len(labels[identity]) == 1:
            written.setdefault(identity, _single(row, side))
    return list(written.values())


def _identity(row: Row, side: str) -> tuple[Any, str]:
    """Equal for equal completions of one prompt; ids say more than text, which may have been decoded from others."""
    return row["prompt_index"], repr(row.get(f"{side}_ids") or row[side])


def _single(row: Row, side: str) -> Row:
    """One side of a pair as a row of its own."""
    kept = {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    if f"{side}_ids" in row:
        kept["completion_ids"] = row[f"{side}_ids"]
    for name, value in row.items():
        for field in ("score", "length", "share"):
            if name == f"{field}_{side}" or name.startswith(f"{field}_{side}."):
                kept[name.replace(f"_{side}", "", 1)] = value
    return {**kept, "prompt_index": row["prompt_index"]}

"""What the columns of rows are called, and which column of another name may be meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence

PROMPTS = ("prompt", "judged_prompt", "corrupted_prompt")
COMPLETIONS = ("completion", "chosen", "rejected")
SAMPLED_IDS = tuple(f"{name}_ids" for name in COMPLETIONS)

LIKELY: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "input", "problem", "request"),
    "completion": ("response", "output", "solution", "reply", "answer", "target"),
    "chosen": ("preferred", "accepted", "better", "winner"),
    "rejected": ("dispreferred", "discarded", "worse", "loser"),
    "label": ("correct", "is_correct", "outcome"),
    "answer": ("gold", "golden", "ground_truth", "reference", "target", "solution", "final_answer"),
    "text": ("post", "response", "output", "completion"),
}


def naming(column: str, columns: Sequence[str]) -> str:
    """What to do about a column that is not there: which of `columns` could be it, where one's name says so."""
    likely = LIKELY.get(column, ())
    parts = {name: name.lower().split("_") for name in columns}
    meant = [name for wanted in likely for name in columns if name.lower() == wanted]
    meant += [name for name in columns if column in parts[name] and "ids" not in parts[name]]
    if meant:
        return f"name the one that holds it, as in columns: {{{column}: {meant[0]}}}"
    return f"if another column holds it, name that in columns: {{{column}: ...}}; or give other data"


def in_common(sets: Sequence[Collection[str]]) -> list[str]:
    """The columns that all of several data sets have, in the order of the first.

    Sampled ids of a completion that all have are kept if one has them: the others' rows are encoded from their text.
    """
    every = dict.fromkeys(name for columns in sets for name in columns)
    shared = [name for name in every if all(name in columns for columns in sets)]
    ids = [name for name in every if name in SAMPLED_IDS and name not in shared]
    return shared + [name for name in ids if name.removesuffix("_ids") in shared]

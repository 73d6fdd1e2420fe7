"""Runs a recipe again and again, each time in a process that kills itself: RECIPE LOG DEATH...

A death is `EVENT:COUNT`. At the COUNT-th occurrence of the event in that process it gets SIGKILL: `sampling` begins,
a file is about to be put in its place (`written`), or has been put there (`kept`). The last run is left alone. Every
sampling is a line in LOG. Processes are forked from this one, which has imported everything and done nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from rlhf_kit.pairs import context, files, stage  # noqa: F401  (so that a fork need not import them)
from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs.pipeline import run_pipeline


def counted(event: str, deaths: dict[str, int], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which lets the process die in time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        deaths[event] = deaths.get(event, 0) - 1
        if deaths[event] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def run(recipe: str, log: str, death: str) -> None:
    """Run the recipe, in a forked process."""
    event, _, count = death.partition(":")
    deaths = {event: int(count)} if count else {}
    sample = context.PairsContext.sample

    def sampled(self: Any, prompts: Any) -> Any:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{len(prompts)}\n")
        return sample(self, prompts)

    def replace(source: Any, target: Any) -> None:
        counted("written", deaths, lambda: None)()
        os.replace(source, target)
        counted("kept", deaths, lambda: None)()

    context.PairsContext.sample = counted("sampling", deaths, sampled)  # type: ignore[method-assign]
    files.os = SimpleNamespace(replace=replace)  # type: ignore[assignment]
    run_pipeline(load_recipe(recipe))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for death in (*sys.argv[3:], ""):
        child = os.fork()
        if child == 0:
            try:
                run(sys.argv[1], sys.argv[2], death)
                os._exit(0)
            except BaseException as error:
                print(f"{death}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        expected = -signal.SIGKILL if death else 0
        assert code == expected, f"{death or 'the last run'} ended with {code}"

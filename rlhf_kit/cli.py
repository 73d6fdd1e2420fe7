"""The command line: `rlhf-kit check | train | pairs | eval | report`.

torch, TRL and transformers are imported inside the commands that train, so that help and errors come at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rlhf_kit.problems import Problem
    from rlhf_kit.recipe import Recipe
    from rlhf_kit.recipe_plan import Section

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train language models with dense and implicit rewards.

    A **recipe** is a YAML file. It describes one stage (`type: sft`, `reward`, `segment`, `pairs`,
    `preference`, `bootstrap`, `ppo` or `eval`) or a pipeline of named `stages` that refer to each other's
    outputs (`${stages.sft.model}`). Look into recipes/ for examples to start from. A stage has a `model`,
    `data`, `trainer.args` (the arguments of TRL and transformers, by their own names), and for ppo
    `rewards` and `credit`. A first run:

    - `rlhf-kit check recipes/quickstart.yaml`
    - `rlhf-kit train recipes/quickstart.yaml`
    - `rlhf-kit report runs/quickstart`

    Everything a run writes is in its run folder, runs/NAME: the resolved recipe, metrics, samples with
    per-token credit, checkpoints, the model and report.html.
    """,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe, in order. KEY is a dotted path (stages.ppo.rewards.0.weight), VALUE is "
        "YAML and replaces what was there (nothing after = is null); '~KEY' deletes a key or a list item.",
        show_default=False,
    ),
]
ConfigName = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME|FILE",
        help="accelerate configuration, by its name in accelerate_configs/ or as a file; it tells the number "
        "of processes.",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        min=1,
        help="Processes, where the configuration leaves it open.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from rlhf_kit import __version__

        print(f"rlhf-kit {__version__}")
        raise typer.Exit


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    config: ConfigName = None,
    num_processes: Processes = None,
) -> None:
    """Validate a recipe and print what it will run, without loading a model.

    Finds unknown and misspelt keys, wrong types, missing files, arguments that TRL does not know, batches that
    do not divide into groups, data that lack a column, and combinations that cannot work. Each error is one
    line with the field, its value and what to do; the exit code is then 2.

    Examples:

    - `rlhf-kit check recipes/quickstart.yaml`
    - `rlhf-kit check recipe.yaml stages.ppo.credit.estimator=gae '~stages.ppo.rewards.1'`
    - `rlhf-kit check recipe.yaml --config zero2 --num-processes 4`
    """
    loaded, world_size = _load(recipe, overrides or [], config, num_processes)
    from rlhf_kit.recipe_plan import plan
    from rlhf_kit.recipe_warnings import warnings

    if _is_main_process():
        header = f"{loaded.name}: seed {loaded.seed}, run folder {loaded.run_folder}"
        _print_plan(header, plan(loaded, world_size), warnings(loaded))


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, config: ConfigName = None) -> None:
    """Check a recipe, then train it stage by stage.

    The run can be stopped at any time: the same command goes on from the last checkpoint, and stages that are
    done are not repeated. More than one process is started with ./launch.sh --config NAME RECIPE.

    Examples:

    - `rlhf-kit train recipes/quickstart.yaml`
    - `rlhf-kit train recipe.yaml name=smaller-rate stages.ppo.trainer.args.learning_rate=1e-6`
    """
    loaded, _ = _load(recipe, overrides or [], config, None, launched=True)
    _run(loaded)


def _run(recipe: Recipe, evaluations_alone: bool = False) -> None:
    """Run a recipe's stages; on an error, its line and the end of the process."""
    from rlhf_kit.errors import RunError

    try:
        from rlhf_kit.runs.pipeline import run_pipeline

        run_pipeline(recipe, evaluations_alone=evaluations_alone)
        _leave_process_group()
    except Exception as error:
        # What the data, a hub or a disk say is for the user; where it happened is for whoever asks for it.
        if os.environ.get("RLHF_KIT_TRACEBACK"):
            raise
        hint = "" if isinstance(error, RunError) else " (RLHF_KIT_TRACEBACK=1 shows where)"
        _fail(f"{error}{hint}", FAILED)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)


@app.command()
def pairs(recipe: RecipeFile, overrides: Overrides = None, config: ConfigName = None) -> None:
    """Check a recipe with a stage of type pairs, then run it, and write rows to train on.

    It is `train` for a recipe that makes data: the same command goes on where it was killed, without repeating or
    losing a prompt. Files are in the stage's folder: paired, unpaired (KTO), sft or completions, with every score.

    Examples:

    - `rlhf-kit pairs recipes/pairs/arithmetic.yaml`
    - `rlhf-kit pairs recipe.yaml stages.pairs.select.type=small_margin stages.pairs.select.budget=500`
    """
    loaded, _ = _load(recipe, overrides or [], config, None, launched=True)
    if not any(stage.type == "pairs" for stage in loaded.stages.values()):
        what = f"{recipe}: it has no stage of type pairs: add one, or run it with `rlhf-kit train`"
        _fail(what, BAD_INPUT)
    _run(loaded)


@app.command(name="eval")
def evaluate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe, then run its stages of type eval, and write their figures into the report.

    Stages that train must be done (`train` runs all of them, evaluations included). An evaluation that is done is
    repeated only where it, or something it reads, has changed; so evaluations can be added to a recipe later.

    Examples:

    - `rlhf-kit eval recipes/eval/arithmetic.yaml`
    - `rlhf-kit eval recipe.yaml stages.eval.evals.votes.num_completions=8`
    """
    loaded, _ = _load(recipe, overrides or [], None, None)
    _run(loaded, evaluations_alone=True)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run folder, such as runs/quickstart.")],
) -> None:
    """Write report.html into a run folder, with curves, sources and per-token credit, and print its path.

    Only the run folder is read: the report can be made on any machine, also while the run goes on.

    Example: `rlhf-kit report runs/quickstart`
    """
    if not run_folder.is_dir():
        _fail(f"{run_folder}: no such run folder; name one such as runs/quickstart", BAD_INPUT)
    from rlhf_kit.errors import RunError
    from rlhf_kit.runs.report import write_report

    try:
        print(write_report(run_folder))
    except RunError as error:
        _fail(str(error), BAD_INPUT)


def main() -> None:
    """Run the command line."""
    app(prog_name="rlhf-kit")


def _leave_process_group() -> None:
    """Part from the other processes in order: one that just ends can take the others with it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _load(
    path: Path, overrides: list[str], config: str | None, num_processes: int | None, launched: bool = False
) -> tuple[Recipe, int]:
    """The recipe and the world size; on an error, its lines and the end of the process."""
    from rlhf_kit.problems import RecipeError
    from rlhf_kit.recipe import load_recipe
    from rlhf_kit.recipe_checks import check_deepspeed
    from rlhf_kit.recipe_data import check_data
    from rlhf_kit.world_size import uses_deepspeed, world_size_of

    try:
        world_size = world_size_of(config, num_processes)
        if launched and world_size > 1 and "WORLD_SIZE" not in os.environ:
            _fail(
                f"--config {config} asks for {world_size} processes and this is one; "
                f"start them with ./launch.sh --config {config} {path}",
                BAD_INPUT,
            )
        recipe = load_recipe(path, overrides, world_size)
        if uses_deepspeed(config):
            check_deepspeed(recipe, path)
        check_data(recipe, path)
        return recipe, world_size
    except RecipeError as error:
        _fail(str(error), BAD_INPUT)


def _fail(message: str, code: int) -> NoReturn:
    """Say it and exit; bad input, which every process finds, is said once."""
    if _is_main_process():
        print(message, file=sys.stderr)
    elif code == FAILED:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_plan(header: str, sections: list[Section], doubts: list[Problem]) -> None:
    """The plan, in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(header, style="bold"))
    for title, rows in sections:
        console.print(Text(f"\n{title}", style="bold cyan"))
        for topic, text in rows:
            console.print(Text.assemble((f"   {topic:<12}", "dim"), text))
    console.print()
    for doubt in doubts:
        console.print(Text(f"warning: {doubt}", style="yellow"))
    console.print(Text("recipe is valid", style="green"))

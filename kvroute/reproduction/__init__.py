"""A recipe run from its questions to a table of published figures and ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvroute.errors import InvalidInputError
from kvroute.recipes import Recipe
from kvroute.reproduction.data import Source
from kvroute.reproduction.report import Reproduction
from kvroute.reproduction.steps import Engines, Steps

__all__ = ["Engines", "Reproduction", "Source", "reproduce"]


def reproduce(
    recipe: Recipe,
    out: Path,
    engines: Engines,
    source: Source,
    *,
    redo: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Run a recipe. Everything that the writing engine does comes first.

    It may be killed at any moment: the next call with the same words goes on where it was.

    Args:
        recipe: what to run.
        out: folder of all results, one file or folder a step.
        engines: opened when they are needed; if all is there, neither is.
        source: of the recipe's sets.
        redo: do steps anew that a changed recipe or changed data concerns; without it a change is refused.
        progress: whether to show bars; by default on a terminal.
        say: told of each step.

    Raises:
        InvalidInputError: a set is not there, a step is of another recipe, or another run is at work in the folder.
        KVRouteError: what the steps raise.
    """
    from filelock import FileLock, Timeout

    from kvroute.reports.plots import require_matplotlib
    from kvroute.reproduction.embeddings import Embedding
    from kvroute.reproduction.routing import Routing
    from kvroute.reproduction.scores import Scoring

    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(out / ".lock"), timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InvalidInputError(f"Another run is at work in {out}.", hint="Wait for it, or stop it.") from error
    except OSError as error:
        raise InvalidInputError(f"{out} can't be written: {error.strerror or error}.") from error
    try:
        steps = Steps(out / "steps", redo=redo, say=say)
        rest = (source, out, steps, engines, progress)
        routing = None if recipe.routing is None else Routing(recipe, *rest)
        scores = None if recipe.scores is None else Scoring(recipe, *rest)
        figures: dict[str, dict[str, float | None]] = {}
        if routing is not None:
            routing.label()
        if scores is not None:
            scores.answer()
        if routing is not None:
            routing.train()
            routing.calibrate()
            figures |= routing.evaluate()
        if scores is not None:
            figures |= scores.score()
        if recipe.embeddings is not None:
            figures |= Embedding(recipe, *rest).evaluate()
        notes = {name: {k: v for k, v in result.items() if k != "figures"} for name, result in steps.results.items()}
        return Reproduction.of(recipe, figures, notes, steps.done, steps.skipped, source.limit)
    finally:
        lock.release()

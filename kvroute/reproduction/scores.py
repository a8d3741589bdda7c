"""The scores part of a recipe: answers, and how well scores of them tell right from wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.checkers import check, number_within
from kvroute.progress import progress_bar
from kvroute.recipes import DataSet, Recipe
from kvroute.reproduction.data import Source
from kvroute.reproduction.steps import Engines, Steps
from kvroute.routing_intervals import Resamples
from kvroute.rows import PartialRun, parse_jsonl
from kvroute.scores import SCORES

if TYPE_CHECKING:
    from kvroute.generation import Message
    from kvroute.questions import Question

_LEAST = 2
"""Right and wrong answers that a figure needs."""


class Scoring:
    """Runs the part. Arguments as for :class:`~kvroute.reproduction.routing.Routing`."""

    def __init__(
        self, recipe: Recipe, source: Source, out: Path, steps: Steps, engines: Engines, progress: bool | None
    ) -> None:
        assert recipe.scores is not None
        self.recipe, self.part, self.source = recipe, recipe.scores, source
        self.out, self.steps, self.engines, self.progress = out, steps, engines, progress
        self._tokenizer: Any = None

    def answer(self) -> None:
        """One answer to every question; the only step that needs the engine that writes."""
        for part in self.part.test:
            questions = self.source.questions(part)
            facts = [self.recipe.model, self.recipe.dtype, self.recipe.chunk, self.part.prompt, self.part.max_tokens,
                     part.tolerance, [[q.id, q.question, q.answer, q.answer_type] for q in questions]]  # fmt: skip
            self.steps.run(
                f"answer-{part.name}", facts,
                lambda fresh, part=part, questions=questions, facts=facts: self._answer(part, questions, facts, fresh),  # type: ignore[misc]
            )  # fmt: skip

    def _answer(self, part: DataSet, questions: Sequence[Question], facts: object, fresh: bool) -> dict[str, Any]:
        engine = self.engines.writer()
        self._tokenizer = engine.tokenizer
        checkers = {} if part.tolerance is None else {k: number_within(part.tolerance) for k in ("number", "list")}
        identity = {"command": "reproduce answers", "facts": facts, "fingerprint": engine.info.fingerprint}
        with PartialRun(
            self._answers(part), identity, len(questions), chunk=self.recipe.chunk, restart=fresh, force=True
        ) as run:
            missing = run.missing
            with progress_bar("Answering", len(questions), show=self.progress) as advance:
                advance(len(questions) - sum(stop - start for start, stop in missing))
                for start, stop in missing:
                    asked = questions[start:stop]
                    found = engine.generate(
                        [self._prompt(q) for q in asked], max_tokens=self.part.max_tokens, temperature=0.0,
                        progress=False,
                    )  # fmt: skip
                    lines = []
                    for q, one in zip(asked, found, strict=True):
                        checked = check(one.text, q.answer, q.answer_type, checkers=checkers)
                        lines.append(
                            json.dumps({"id": q.id, "question": q.question, "answer": one.text, "finish_reason":
                                        one.finish_reason, "tokens": list(one.token_ids), "correct": checked.correct})
                        )  # fmt: skip
                    run.write(start, ("\n".join(lines) + "\n").encode())
                    advance(stop - start)
            run.finish()
        rows = self._rows(part)
        return {"rows": len(rows), "right": sum(r["correct"] for r in rows)}

    def score(self) -> dict[str, dict[str, float | None]]:
        """AUROC and FPR95 of every score on every set."""
        found: dict[str, dict[str, float | None]] = {}
        for part in self.part.test:
            result = self.steps.run(
                f"score-{part.name}", list(self.part.scores),
                lambda _, part=part: self._score(part), after=(f"answer-{part.name}",),  # type: ignore[misc]
            )  # fmt: skip
            found |= result["figures"]
        return found

    def _score(self, part: DataSet) -> dict[str, Any]:
        from kvroute.self_evaluation import SelfEvaluator

        rows = [r for r in self._rows(part) if len(r["tokens"]) > 1]  # a lone token has no keys and values to read
        evaluator = SelfEvaluator(self.engines.reader(), scores=self.part.scores)
        self._tokenizer = evaluator.engine.tokenizer
        evaluations = evaluator.score_many(
            [(self._prompt_of(r["question"]), r["tokens"]) for r in rows], progress=self.progress
        )
        truth = np.array([r["correct"] for r in rows], dtype=bool)
        values = {
            name: np.array([np.nan if (v := e.scores[name].value) is None else v for e in evaluations])
            for name in self.part.scores
        }
        return {"figures": score_figures(part.name, values, truth), "rows": len(rows)}

    def _answers(self, part: DataSet) -> Path:
        return self.out / "answers" / f"{part.name}.jsonl"

    def _rows(self, part: DataSet) -> list[dict[str, Any]]:
        path = self._answers(part)
        return [row for _, row in parse_jsonl(path.read_text(encoding="utf-8"), path)]

    def _prompt(self, question: Question) -> Any:
        return self._prompt_of(question.question)

    def _prompt_of(self, question: str) -> Any:
        text = self.part.prompt.replace("{question}", question)
        messages: list[Message] = [{"role": "user", "content": text}]
        return messages if getattr(self._tokenizer, "chat_template", None) else text


def score_figures(name: str, values: Mapping[str, Any], truth: Any) -> dict[str, dict[str, float | None]]:
    """AUROC and FPR95 with intervals; without a value where too few answers are right, or wrong.

    Args:
        name: of the set.
        values: by score ``[n]``, NaN where an answer has none; such rows are left out.
        truth: ``[n]`` bool.
    """
    from kvroute.score_metrics import Drawn

    found: dict[str, dict[str, float | None]] = {}
    for score, of in values.items():
        there = np.isfinite(of)
        right = truth[there]
        for figure in ("auroc", "fpr95"):
            found[f"{name}.{score}.{figure}"] = {"value": None, "low": None, "high": None}
        if min(right.sum(), (~right).sum()) < _LEAST:
            continue
        sign = 1.0 if SCORES[score].direction == "higher" else -1.0
        estimates = Drawn.of(sign * of[there], None, right, Resamples(len(right))).estimates()
        for figure in ("auroc", "fpr95"):
            found[f"{name}.{score}.{figure}"] = estimates[figure].to_dict()
    return found

"""The tiny thinker and its labelled questions, for the scripts that need them; labels are kept in .cache."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from _harness import Figure, add_common_arguments, judge
from kvroute import TransformersEngine
from kvroute.label_rows import LabelMeta, LabelRow, Part, read_labels, write_meta
from kvroute.labelling import Labeller
from kvroute.questions import Question, read_questions
from kvroute.routing_intervals import Estimate
from kvroute.routing_metrics import wilson
from kvroute.rows import PartialRun

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "tiny_thinker"
CACHE = ROOT / ".cache" / "thinker"
MAX_TOKENS = {"fast": 48, "slow": 192}
"""More than any of its answers has."""
_CHUNK = 512


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The shared arguments, and ``--thinker``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--thinker", type=Path, help="folder of the model, by default the one in examples")
    return parser


def engine(folder: str | Path | None = None) -> TransformersEngine:
    """The tiny thinker, with batches that suit its size."""
    return TransformersEngine.from_pretrained(str(folder or FOLDER / "model"), dtype="float32", token_budget=8192)


def share(hits: Sequence[bool]) -> Figure:
    """Share of true ones, with Wilson's interval."""
    value = sum(hits) / len(hits)
    return Figure(value, *wilson(value, len(hits)), None, None, len(hits))


def figure(estimate: Estimate, must: str | None, rows: int) -> Figure:
    """An estimate over rows as a figure."""
    value, low, high = (float("nan") if v is None else v for v in (estimate.value, estimate.low, estimate.high))
    return Figure(value, low, high, must, judge(low, high, must), rows)


def questions(n: int, seed: int) -> list[Question]:
    """Different questions (training draws its own as it goes)."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    from questions import make_questions

    return read_questions(list(enumerate(make_questions(n, seed), 1)), "the questions")


def labelled(
    thinker: TransformersEngine,
    asked: Sequence[Question],
    shares: dict[Part, float],
    *,
    checkpoints: int | None,
    parts: Sequence[Part],
) -> tuple[list[LabelRow], LabelMeta]:
    """Labels of the questions that fall into some parts; read from the cache where they were made before."""
    from kvroute.skeletons import part_of, skeleton_digest

    labeller = Labeller(thinker, max_tokens=MAX_TOKENS, checkpoints=checkpoints, shares=shares)
    kept = [q for q in asked if part_of(skeleton_digest(q.question), shares) in parts]
    meta = labeller.meta(kept)
    name = hashlib.sha256(meta.model_dump_json().encode()).hexdigest()[:16]
    path = CACHE / f"{name}.jsonl"
    if not path.exists():
        identity = {"meta": meta.model_dump(mode="json")}
        with PartialRun(path, identity, len(kept), chunk=_CHUNK, force=True) as run:
            for start, stop in run.missing:
                rows = labeller.label(kept[start:stop])
                run.write(start, "".join(r.model_dump_json() + "\n" for r in rows).encode())
                print(f"labelled {stop} of {len(kept)}", file=sys.stderr)
            write_meta(path, meta)
            run.finish()
    return read_labels(path)

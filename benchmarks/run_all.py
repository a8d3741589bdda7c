"""Runs the scripts of this folder, keeps what they measured, and says which figures moved since the last run.

A figure *moved* where its interval and that of the run before have no number in common; where they overlap it is
*unchanged*, as far as these runs can tell. Exact figures (bytes, counts) have no width: any change moves them. A figure
that moved on another machine, with other versions or another seed is shown as such: the note above the table says so.

Each run gets a folder of its own under ``results/bench/full`` or ``quick`` (ignored by git), a JSON file a script. A
script is compared with the newest earlier run that holds it, or with ``--baseline FOLDER``. Exit code 1: a script
failed, took too long or did not end with its JSON line; whatever was measured besides is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from _harness import table

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "bench"
State = Literal["moved up", "moved down", "unchanged", "new", "gone"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One figure of a script, before and now; None where it is not there."""

    script: str
    figure: str
    before: Mapping[str, Any] | None
    now: Mapping[str, Any] | None

    @property
    def state(self) -> State:
        if self.before is None or self.now is None:
            return "new" if self.before is None else "gone"
        if _above(self.now["low"], self.before["high"]):
            return "moved up"
        return "moved down" if _above(self.before["low"], self.now["high"]) else "unchanged"


def _above(a: float, b: float) -> bool:
    """Whether a lies above b by more than rounding."""
    return a > b and not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def scripts_in(folder: Path, *, vllm: bool = False) -> list[Path]:
    """The scripts, by name: those on vLLM, or all others."""
    found = sorted(p for p in folder.glob("[a-z]*.py") if p.name != Path(__file__).name)
    return [p for p in found if p.name.startswith("vllm_") == vllm]


def compare(script: str, before: Result | None, now: Result) -> list[Change]:
    """A script's figures beside those of an earlier run."""
    old = {} if before is None else before["figures"]
    names = dict.fromkeys([*now["figures"], *old])
    return [Change(script, name, old.get(name), now["figures"].get(name)) for name in names]


def differences(before: Result, now: Result) -> list[str]:
    """What besides the code differs between two runs: machine, versions, seed, how much was measured."""
    found = [f"seed {before.get('seed')} -> {now.get('seed')}"] if before.get("seed") != now.get("seed") else []
    for part in ("machine", "versions"):
        old, new = before.get(part, {}), now.get(part, {})
        found += [f"{k} {old.get(k)} -> {new.get(k)}" for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    return found


def read_result(text: str) -> Result | None:
    """The JSON line that an output ends with, or None where it ends with none."""
    lines = text.rstrip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
        for figure in found["figures"].values():
            float(figure["low"]), float(figure["high"]), float(figure["value"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return dict(found)


def run_script(script: Path, options: Sequence[str], timeout: float) -> tuple[Result | None, str]:
    """Run a script, showing what it prints; its result, or None and why."""
    process = subprocess.Popen(
        [sys.executable, str(script), "--json", *options], stdout=subprocess.PIPE, text=True, errors="replace"
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    clock = threading.Timer(timeout, end)
    clock.start()
    printed = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if not line.startswith('{"'):
                print(line, end="", flush=True)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        clock.cancel()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
    if late.is_set():
        return None, f"took more than {timeout:g} s"
    if code:
        return None, f"ended with exit code {code}"
    result = read_result("".join(printed))
    return result, "" if result is not None else "did not end with its JSON line"


def saved(folder: Path, script: str) -> Result | None:
    """A script's result in the folder of a run, or None."""
    path = folder / f"{script}.json"
    return read_result(path.read_text()) if path.is_file() else None


def last_saved(root: Path, script: str) -> Result | None:
    """A script's result in the newest run that holds it."""
    runs = sorted((p for p in root.glob("*") if p.is_dir()), reverse=True) if root.is_dir() else []
    return next((found for run in runs if (found := saved(run, script)) is not None), None)


def change_table(changes: Sequence[Change], *, everything: bool) -> str:
    """What changed as a table; with ``everything`` also what did not."""
    rows = [
        (c.script, c.figure, _shown(c.before), _shown(c.now), c.state)
        for c in changes
        if everything or c.state != "unchanged"
    ]
    return table(("script", "figure", "before", "now", ""), rows)


def _shown(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    wide = figure["high"] > figure["low"]
    return f"{figure['value']:.4g}" + (f" [{figure['low']:.4g}, {figure['high']:.4g}]" if wide else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts to run, without .py; by default all")
    parser.add_argument("--vllm", action="store_true", help="the scripts on vLLM, and no others")
    parser.add_argument("--quick", action="store_true", help="under a minute each; compared with quick runs")
    parser.add_argument("--baseline", type=Path, help="folder of the run to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where runs are kept")
    parser.add_argument("--scripts", type=Path, default=HERE, help="where the scripts are")
    parser.add_argument("--timeout", type=float, default=40_000.0, help="seconds a script may take")
    parser.add_argument("--all", action="store_true", help="show the figures that did not move too")
    arguments = parser.parse_args(argv)
    scripts = scripts_in(arguments.scripts, vllm=arguments.vllm)
    unknown = set(arguments.names) - {p.stem for p in scripts}
    if unknown:
        parser.error(f"no such script: {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in scripts)}")
    if arguments.baseline is not None and not arguments.baseline.is_dir():
        parser.error(f"--baseline {arguments.baseline} is not a folder")
    root = arguments.out / ("quick" if arguments.quick else "full")
    run = root / time.strftime("%Y%m%d-%H%M%S")
    changes: list[Change] = []
    failed: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for script in scripts:
        if arguments.names and script.stem not in arguments.names:
            continue
        print(f"== {script.name}", flush=True)
        result, why = run_script(script, ["--quick"] if arguments.quick else [], arguments.timeout)
        if result is None:
            failed[script.name] = why
            print(f"{script.name} {why}", flush=True)
            continue
        before = saved(arguments.baseline, script.stem) if arguments.baseline else last_saved(root, script.stem)
        run.mkdir(parents=True, exist_ok=True)
        (run / f"{script.stem}.json").write_text(json.dumps(result) + "\n")
        changes += compare(script.stem, before, result)
        for note in differences(before, result) if before else ():
            notes.setdefault(note, []).append(script.stem)
    print("\n== what moved", flush=True)
    for note, names in notes.items():
        print(f"Not only the code differs: {note} ({', '.join(names)}).")
    if any(arguments.all or c.state != "unchanged" for c in changes):
        print(change_table(changes, everything=arguments.all))
    states = [c.state.split()[0] for c in changes]
    print(", ".join(f"{states.count(s)} {s}" for s in ("moved", "unchanged", "new", "gone")) + f"; kept in {run}")
    for name, why in failed.items():
        print(f"FAILED: {name} {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``make bench``: what moved, what did not, and scripts that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from run_all import HERE, compare, differences, main, scripts_in

SCRIPT = """
import json, sys
print("| a table |")
if {code}: sys.exit({code})
print(json.dumps({{"name": "x", "figures": json.loads('''{figures}'''), "seed": 0, "quick": "--quick" in sys.argv,
                  "machine": {{"cores": {cores}}}, "versions": {{}}}}))
{after}
"""


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


class Bench:
    """A folder of scripts, run with what they print."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.scripts, self.out, self.capsys = tmp_path / "scripts", tmp_path / "out", capsys
        self.scripts.mkdir()

    def write(self, name: str, figures: dict[str, Any], *, code: int = 0, cores: int = 2, after: str = "") -> None:
        text = SCRIPT.format(figures=json.dumps(figures), code=code, cores=cores, after=after)
        (self.scripts / f"{name}.py").write_text(text)

    def run(self, *more: str) -> tuple[int, str]:
        code = main(["--scripts", str(self.scripts), "--out", str(self.out), *more])
        return code, self.capsys.readouterr().out

    def runs(self, kind: str = "full") -> list[Path]:
        return sorted((self.out / kind).iterdir())


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    ticks = iter(range(100))
    monkeypatch.setattr("run_all.time.strftime", lambda _: f"run-{next(ticks):02}")
    return Bench(tmp_path, capsys)


@pytest.mark.parametrize(
    ("before", "now", "state"),
    [
        (figure(1.0, 0.9, 1.1), figure(1.15, 1.05, 1.2), "unchanged"),
        (figure(1.0, 0.9, 1.1), figure(1.1, 1.1, 1.2), "unchanged"),  # they share one number
        (figure(1.0, 0.9, 1.1), figure(1.2, 1.11, 1.3), "moved up"),
        (figure(1.0, 0.9, 1.1), figure(0.8, 0.7, 0.89), "moved down"),
        (figure(8), figure(9), "moved up"),
        (figure(0.3), figure(0.1 + 0.2), "unchanged"),
        (None, figure(1), "new"),
        (figure(1), None, "gone"),
    ],
)
def test_a_figure_moves_when_the_intervals_have_nothing_in_common(before: Any, now: Any, state: str) -> None:
    old = {"figures": {"f": before} if before else {}}
    new = {"figures": {"f": now} if now else {}}
    assert [c.state for c in compare("s", old, new)] == [state]


def test_runs_are_kept_and_compared_with_the_last_one(bench: Bench) -> None:
    bench.write("one", {"a": figure(1.0, 0.9, 1.1), "b": figure(7)})
    bench.write("two", {"c": figure(2.0, 1.9, 2.1)})
    bench.write("vllm_three", {"d": figure(1)})
    bench.write("_shared", {"e": figure(1)})
    code, out = bench.run()
    assert code == 0
    assert "| a table |" in out
    assert '{"name"' not in out  # the JSON line is for the file
    assert "0 moved, 0 unchanged, 3 new, 0 gone" in out
    assert [p.name for p in sorted(bench.runs()[0].iterdir())] == ["one.json", "two.json"]
    bench.write("one", {"a": figure(1.05, 0.95, 1.15), "b": figure(8)}, cores=4)
    code, out = bench.run("one")
    assert code == 0
    assert "| one | b | 7 | 8 | moved up |" in out
    assert "| one | a |" not in out
    assert "Not only the code differs: cores 2 -> 4 (one)." in out
    assert "1 moved, 1 unchanged, 0 new, 0 gone" in out
    bench.write("two", {"c": figure(3.0, 2.9, 3.1)})
    code, out = bench.run("--all")  # "two" is compared with the run before the last: the last one did not hold it
    assert "| two | c | 2 [1.9, 2.1] | 3 [2.9, 3.1] | moved up |" in out
    assert "| one | b | 8 | 8 | unchanged |" in out
    assert "1 moved, 2 unchanged" in out
    code, out = bench.run("--baseline", str(bench.runs()[0]), "one")
    assert "| one | b | 7 | 8 | moved up |" in out
    assert "1 moved" in out


def test_quick_runs_are_compared_with_quick_ones(bench: Bench) -> None:
    bench.write("one", {"a": figure(1)})
    bench.run()
    code, out = bench.run("--quick")
    assert code == 0
    assert "0 moved, 0 unchanged, 1 new" in out
    assert json.loads((bench.runs("quick")[0] / "one.json").read_text())["quick"] is True
    assert json.loads((bench.runs("full")[0] / "one.json").read_text())["quick"] is False


def test_scripts_on_vllm_run_apart(bench: Bench) -> None:
    bench.write("one", {"a": figure(1)})
    bench.write("vllm_two", {"b": figure(1)})
    assert "== one.py" not in bench.run("--vllm")[1]
    assert [p.name for p in bench.runs()[0].iterdir()] == ["vllm_two.json"]


def test_what_fails_is_said_and_the_rest_is_kept(bench: Bench) -> None:
    bench.write("bad", {"a": figure(1)}, code=3)
    bench.write("good", {"b": figure(1)})
    bench.write("late", {"c": figure(1)}, after="import time; time.sleep(60)")
    bench.write("silent", {"d": figure(1)}, after="print('and that is all')")
    (bench.scripts / "wrong.py").write_text('print(\'{"figures": {"a": {"value": null}}}\')')
    code, out = bench.run("--timeout", "3")
    assert code == 1
    for line in (
        "FAILED: bad.py ended with exit code 3", "FAILED: late.py took more than 3 s",
        "FAILED: silent.py did not end with its JSON line", "FAILED: wrong.py did not end with its JSON line",
    ):  # fmt: skip
        assert line in out
    assert [p.name for p in bench.runs()[0].iterdir()] == ["good.json"]


def test_what_is_not_there_is_refused(bench: Bench) -> None:
    bench.write("one", {"a": figure(1)})
    for words in (["two"], ["--baseline", "nowhere"]):
        with pytest.raises(SystemExit):
            bench.run(*words)


def test_the_scripts_of_this_repository() -> None:
    names = {p.stem for p in scripts_in(HERE)}
    assert "prefill_overhead" in names
    assert not any(n.startswith(("_", "vllm_", "run_all")) for n in names)
    assert {p.stem for p in scripts_in(HERE, vllm=True)} >= {"vllm_parity", "vllm_soak"}
    assert "results/" in (HERE.parent / ".gitignore").read_text()


def test_other_seeds_and_versions_are_said() -> None:
    old = {"seed": 0, "machine": {"cpu": "a"}, "versions": {"torch": "1", "gone": "1"}}
    new = {"seed": 1, "machine": {"cpu": "a"}, "versions": {"torch": "2"}}
    assert differences(old, new) == ["seed 0 -> 1", "torch 1 -> 2", "gone 1 -> None"]
    assert differences(old, old) == []

"""What a host or a reader takes from the repository's own files is whole: it parses, and it says what is true."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import kvroute
from kvroute import SCORES

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = "kvroute", "kvroute_kernels", "langchain_kvroute", "llama_index.embeddings.kvroute"


def test_citation() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == kvroute.__version__
    assert cited["license"] == "Apache-2.0"
    assert {"message", "title", "authors"} <= set(cited)
    for work in (cited, *cited["references"]):
        assert work["title"]
        assert all(author.get("name") or author["family-names"] for author in work["authors"])


@pytest.mark.parametrize("name", ["bug", "model", "result", "idea"])
def test_issue_template(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    fields = [f for f in form["body"] if f["type"] != "markdown"]
    assert len({f["id"] for f in fields}) == len(fields) > 0
    assert all(f["type"] in {"input", "textarea", "dropdown", "checkboxes"} for f in fields)
    assert all(f["attributes"]["label"] for f in fields)


def test_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert "bash .ci/run" in commands
    assert "make docs" in commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", " ".join(commands))) <= targets


def test_documents_name_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    for page in pages:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets, page


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = "\n".join(p.read_text() for p in (ROOT / "docs" / "reference").glob("*.md"))
    found = Counter(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    names = {f"{p}.{n}" for p in PUBLIC for n in importlib.import_module(p).__all__ if not n.startswith("__")}
    assert set(found) == names - {"kvroute.KVView"}  # told where it comes from, in kvroute_kernels
    assert max(found.values()) == 1


def test_every_score_is_explained() -> None:
    text = (ROOT / "docs" / "self-evaluation.md").read_text()
    table = text[text.index("## The scores") :]
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(r.split("|")[1] for r in table.splitlines() if r.startswith("|"))))
    assert named == set(SCORES)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        assert (page.parent / target).exists(), target


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(
        r"`((?:kvroute|kernels|integrations|tests|benchmarks|docs)/[\w/.]+\.(?:py|cpp|md|yml))`", text
    ):
        assert (ROOT / name).is_file() or "op" in Path(name).stem, name

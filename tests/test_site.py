"""The pages build without a warning, and a reader's browser asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml")

pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(any(find_spec(n) is None for n in NEEDED), reason="pip install --group docs"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return out


class Loaded(HTMLParser):
    """What a page loads by itself, as opposed to what a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what the browser fetches for a tag."""
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(given.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.addresses += [given[n] for n in ("src", "srcset", "data") if n in given]


def test_no_page_loads_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = Loaded()
        found.feed(page.read_text())
        assert [a for a in found.addresses if re.match(r"(https?:)?//", a)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_formulas_are_drawn(site: Path) -> None:
    text = (site / "concepts.html").read_text()
    assert text.count("<math") >= 8
    assert "arithmatex" not in text
    assert (site / "assets" / "flow.svg").is_file()
    assert 'src="assets/flow.svg"' in text


def test_links_out_of_the_docs_have_a_page(site: Path) -> None:
    assert 'href="examples/tiny_thinker/index.html"' in (site / "langchain.html").read_text()
    assert "KVRouteRouter" in (site / "examples" / "routed_chain.py.html").read_text()
    assert "Unreleased" in (site / "changelog.html").read_text()


def test_reference_says_what_docstrings_say(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "embeddings.html").read_text())
    assert "Embeds texts with the KV cache of a causal model." in text
    assert ":meth:" not in text
    assert ":class:" not in text

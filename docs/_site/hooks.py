"""What the pages need beyond mkdocs: formulas as MathML, and pages for files that links lead to outside of docs/."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that have a page by another name; the README's is written apart."""
SHOWN = ("examples/tiny_thinker/README.md", "examples/*.py", "docs/kubernetes/*.yaml")
"""Files that have a page of their own: a text as it is, a source in one block."""
LANGUAGES = {".py": "python", ".yaml": "yaml"}

FORMULA = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)
LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`(?!\])|\[(?P<text>[^\]\n]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)
"""A link within the repository; code is matched before it, and left."""


def shown() -> dict[str, str]:
    """Files outside of what mkdocs finds, by path from the root, to their pages as paths from docs/."""
    paths = [p.relative_to(ROOT).as_posix() for pattern in SHOWN for p in sorted(ROOT.glob(pattern))]
    return PAGES | {p: page_of(p) for p in paths}


def page_of(path: str) -> str:
    """The page of a file that is shown."""
    path = path.removeprefix("docs/")
    return path if path.endswith(".md") else f"{path}.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of files outside of docs/."""
    for source, page in shown().items():
        if source == "README.md":
            continue
        path = ROOT / source
        text = path.read_text()
        if path.suffix in LANGUAGES:
            text = f"# {path.name}\n\n```{LANGUAGES[path.suffix]}\n{text}```\n"
        # A source is found by links, not listed.
        listed = InclusionLevel.NOT_IN_NAV if path.suffix in LANGUAGES else InclusionLevel.UNDEFINED
        files.append(File.generated(config, page, content=text, inclusion=listed))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:  # noqa: ARG001
    """Lead links to the pages of the files that they name; a file without a page is named without a link."""
    pages, here = shown(), page.file.src_uri
    source = next((path for path, made in pages.items() if made == here and made != "index.md"), f"docs/{here}")

    def lead(match: re.Match[str]) -> str:
        if match["path"] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        if target in pages:
            found = pages[target]
        elif target.startswith("docs/") and not target.startswith("docs/_site/") and (ROOT / target).is_file():
            found = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return f"{match['text']} (`{target}`)"
        else:
            return match[0]  # mkdocs says that it leads nowhere
        return f"[{match['text']}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{match['anchor'] or ''})"

    return LINK.sub(lead, markdown)


def on_page_content(content: str, **kwargs: Any) -> str:  # noqa: ARG001
    """Formulas become MathML, which browsers draw by themselves."""

    def draw(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["tex"]).strip(), display=display)

    return FORMULA.sub(draw, content)

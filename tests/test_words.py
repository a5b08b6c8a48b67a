"""README and guides can be read aloud: short sentences, and figures in tables."""

import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST, MEDIAN, FIGURES = 35, 18, 3


def paragraphs(text):
    """The paragraphs and list items of a page: no code, table, heading, image, formula or directive."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    for block in map(str.strip, blocks):
        if block and block[0] not in "|#<!":
            block = re.sub(r"`[^`]*`", "x", block)
            yield re.sub(r"!?\[([^\]]*)\]\([^)]*\)|\[([^\]]*)\]\[[^\]]*\]", r"\1\2", block)


def sentences(paragraph):
    return [s for s in re.split(r"(?<=[.!?:])\s+", paragraph) if s]


def figures(paragraph):
    return re.findall(r"\d+\.\d+|\d+ %|±", paragraph)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_and_figures_are_in_tables(page):
    for paragraph in paragraphs(page.read_text()):
        for sentence in sentences(paragraph):
            assert len(sentence.split()) <= LONGEST, sentence
        assert len(figures(paragraph)) <= FIGURES, paragraph


def test_the_usual_sentence_is_short():
    lengths = [len(s.split()) for page in PAGES for p in paragraphs(page.read_text()) for s in sentences(p)]
    assert statistics.median(lengths) <= MEDIAN


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 180

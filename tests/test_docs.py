"""The pages show the code as it is, and what they name and link to exists."""
import re
from pathlib import Path

import pytest

from assets.make.write_docs import COMMENT, PAGES, definition, excerpt, fill

ROOT = Path(__file__).parent.parent
MARKDOWN = [page for pattern in ("*.md", "docs/*.md", "assets/*/*.md")
            for page in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_code_as_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(COMMENT, text), "no comment names any code"
    assert fill(text) == text, "run: python assets/make/write_docs.py"


def test_each_row_of_section_3_has_a_quotation_and_a_few_lines_of_code():
    text = (ROOT / "docs" / "section3.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (3\.\d)", text, re.M) == ["3.1", "3.2", "3.3", "3.4"]
    rows = re.findall(r"<tr valign.*?</tr>", text, re.S)
    assert len(rows) > 30
    for row in rows:
        sentence, code = row.split("</td><td>")
        assert re.search(r'^(Sec\. 1: )?".+"', sentence, re.M), sentence
        blocks = re.findall(r"```python\n(.*?)```", code, re.S)
        assert 1 <= sum(block.count("\n") for block in blocks) <= 10, sentence


def test_missing_code_is_named():
    with pytest.raises(ValueError, match="side.py does not define Gate.backward"):
        excerpt("side.py", "Gate.backward", [])
    with pytest.raises(ValueError, match="side.py, Gate.forward: no line begins with 'nu ='"):
        excerpt("side.py", "Gate.forward", ["mu = => nu ="])
    with pytest.raises(ValueError, match="no line begins with 'mu ='"):  # it stands above return
        excerpt("side.py", "Gate.forward", ["return", "mu ="])


def test_readme_names_code_that_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## The paper, sentence by sentence")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+)\.([\w.]+)`", table)
    assert len(names) >= 9
    for file, name in names:
        definition(f"{file}.py", name)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link

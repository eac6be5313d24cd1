"""Documents: links and anchors resolve, lines and documents keep their length, the table of alerts is the rules'."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Reports under perf/results are generated, with whole paragraphs on a line.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "*/README.md", "deploy/*/README.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
LONGEST_LINE = 120
BUDGETS = {
    "README.md": 150,
    "docs/architecture.md": 150,
    "docs/bring-your-own.md": 200,
    "docs/mask.md": 100,
    "docs/operations.md": 350,
    "docs/performance.md": 60,
    "docs/training.md": 150,
}


def find_anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_their_anchors_resolve(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = document.parent / target if target else document
        assert path.exists(), f"expected a file, got {link}"
        if anchor:
            assert anchor in find_anchors(path), f"expected a heading, got {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_not_longer_than_code(document):
    lines = enumerate(document.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("name", BUDGETS)
def test_a_document_keeps_its_budget(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def write_alert_table() -> str:
    """Return the table of docs/operations.md, as it follows from the alert rules."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text())
    lines = ["| alert | severity | after | |", "|---|---|---|---|"]
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        text = rule["annotations"]["summary"]
        summary = re.sub(r"{{ *\$(?:labels\.)?(\w+)[^}]*}}", lambda name: name[1].upper(), text)
        lines.append(f"| {rule['alert']} | {rule['labels']['severity']} | {rule.get('for', '')} | {summary} |")
    return "\n".join(lines)


def test_the_table_of_alerts_is_that_of_the_rules():
    guide = (ROOT / "docs" / "operations.md").read_text()
    assert f"<!-- alerts -->\n{write_alert_table()}\n<!-- /alerts -->" in guide


def test_markers_of_generated_parts_come_in_pairs():
    for document in DOCUMENTS:
        text = document.read_text()
        assert re.findall(r"<!-- (\w+) -->", text) == re.findall(r"<!-- /(\w+) -->", text), document

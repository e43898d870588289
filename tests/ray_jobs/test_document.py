"""Blocks as Markdown and as a page."""

from html.parser import HTMLParser

import pytest

from ray_jobs.document import (
    Code,
    Details,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
    write_document,
)

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
BLOCKS = [
    Heading("A run", level=1),
    Text("One sentence."),
    Picture("rows", "all rows", SVG),
    Table(("", "users"), [("new", "1,203"), ("loyal", "7")]),
    Details("More", [Code("python -m x")]),
]


def test_markdown_is_headings_tables_and_links():
    assert to_markdown(BLOCKS) == (
        "# A run\n\nOne sentence.\n\n![all rows](plots/rows.svg)\n\n"
        "|  | users |\n|---|---:|\n| new | 1,203 |\n| loyal | 7 |\n\n"
        "More:\n\n```\npython -m x\n```\n"
    )


class Tags(HTMLParser):
    """Checks that tags are closed in order and gathers what they refer to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_a_page_needs_no_other_file():
    tags = parse(to_html(BLOCKS))
    assert len(tags.sources) == 1
    assert tags.sources[0].startswith("data:image/svg+xml;base64,")
    assert "1,203" in tags.text


@pytest.mark.parametrize("text", ["<script>x</script>", "a & b", "quote \" and ' end"])
def test_a_page_shows_text_as_it_is(text):
    blocks = [Heading(text), Text(text), Table((text,), [(text,)]), Code(text)]
    tags = parse(to_html(blocks))
    assert sum(found == text for found in tags.text) == 6
    assert "script" not in tags.open


def test_markdown_does_not_read_text_as_its_own():
    table = Table(("x|y",), [("<b>\nand `c` * d",)])
    assert to_markdown([table]) == "| x\\|y |\n|---|\n| \\<b> and \\`c\\` \\* d |\n"


def test_pictures_of_an_earlier_report_are_removed(tmp_path):
    write_document(tmp_path, "report", [Heading("x"), Picture("old", "", SVG)])
    write_document(tmp_path, "report", [Heading("x"), Picture("new", "", SVG)])
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["new.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "plots"}

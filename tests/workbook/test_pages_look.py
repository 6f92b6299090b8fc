"""What pages look like in a real browser, on a laptop and on a telephone: that of a network of
one's own, and those that GitHub shows.
"""

import browser
import pytest
from conftest import CHECKOUT, read_text
from markdown_it import MarkdownIt

from quantlab.__main__ import main

pytestmark = [pytest.mark.long, browser.needed]
WIDTHS = (1280, 400)
PAGES = ["README.md", "pic/README.md", *(
    path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "results/pages").glob("*.md"))]

# What decides there which of a page is how wide, as in GitHub's published stylesheet.
GITHUB = """<!DOCTYPE html><meta charset="utf-8"><base href="{base}"><style>
body {{ font: 16px/1.5 sans-serif; max-width: 1012px; margin: auto; padding: 16px;
        word-wrap: break-word; }}
table {{ display: block; width: max-content; max-width: 100%; overflow: auto; }}
img {{ max-width: 100%; }} pre {{ overflow: auto; }} code {{ font-size: 85%; }}
</style>{body}"""


WRONG = {
    "<p>a sentence</p>": "",
    '<div style="overflow: auto">WIDE</div>': "",
    '<div style="overflow: hidden">WIDE</div>': "TABLE wide: cut off at 392 of 508 px",
    "WIDE": "the page: 508 of 400 px",
    "<h1>" + "x" * 80 + "</h1>": "H1 " + "x" * 40,
    '<div style="overflow: auto"><p>' + "x" * 80 + "</p></div>": "P " + "x" * 40,
    '<img src="nowhere.png" width="9" height="9">': "nowhere.png: no picture",
}


@pytest.mark.parametrize("body, said", WRONG.items())
def test_what_is_wrong_is_seen(body, said, tmp_path):
    wide = '<table style="width: 500px"><tr><td>wide</table>'
    (tmp_path / "page.html").write_text("<!DOCTYPE html>" + body.replace("WIDE", wide))
    with browser.chromium() as page:
        page.open((tmp_path / "page.html").as_uri(), 400)
        faults = page.faults()
    assert bool(faults) == bool(said) and said in " ".join(faults), faults


def test_the_page_of_a_network_of_ones_own_fits(workbook):
    assert main(["inspect", "quantlab.networks.architectures:ResNet20", "--data", "digits",
                 "--weights", "checkpoint/resnet20-digits.safetensors", "-n", "64"]) == 0
    file = workbook / "results" / "inspect-ResNet20.html"
    with browser.chromium() as page:
        for width in WIDTHS:
            page.open(file.as_uri(), width)
            assert page.run("document.querySelectorAll('table, img').length") > 8
            assert page.faults() == []


@pytest.mark.parametrize("name", PAGES)
def test_pages_on_github_fit(name, tmp_path):
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(
        read_text(CHECKOUT / name))
    file = tmp_path / "page.html"
    file.write_text(GITHUB.format(base=(CHECKOUT / name).as_uri(), body=html))
    with browser.chromium() as page:
        for width in WIDTHS:
            page.open(file.as_uri(), width)
            assert page.faults() == []

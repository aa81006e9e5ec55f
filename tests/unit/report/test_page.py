import base64
import gzip
import hashlib
import json
import re

import pytest

from rft_cluster.report.__main__ import SCRIPTS
from rft_cluster.report.collect import collect
from rft_cluster.report.page import FOLDER, pack, render, visible
from rft_cluster.run.history import read_history
from rft_cluster.run.thumbnails import read_thumbnails
from tests.unit.report.whole import written


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = written(tmp_path_factory.mktemp("page"), "<b>&amp;</script>", name="<b>mine")
    (run / "baselines.json").write_text('{"nearest_neighbour": 0.5, "skipped": "<b>no room"}')
    made = collect(read_history(run), read_thumbnails(run), "", None)
    return render("report.html", made.context, made.data, SCRIPTS)


def test_what_is_packed_is_read_back():
    value = {"text": 'ä\u2028</script>"', "numbers": [1, 2.5, None]}
    assert json.loads(gzip.decompress(base64.b64decode(pack(value)))) == value
    assert pack(value) == pack(value), "equal runs give equal files"
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack([float("nan")])  # JavaScript would refuse the whole page's data


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rose\nred", "rose\nred"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("tab\there", "tab\\there"),
        ("म\u200dन 👩\u200d🌾", "म\u200dन 👩\u200d🌾"),
    ],
)
def test_what_would_not_be_seen_is_shown_as_an_escape(text, told):
    assert visible(text) == told


def test_only_the_page_s_own_scripts_and_styles_are_allowed(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    for rule, element in (("script-src", "script"), ("style-src", "style")):
        blocks = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert rules[rule] == [f"'sha256-{digest}'" for digest in digests]
    assert not re.findall(r"\s(?:style|on\w+)=", re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL))


def test_a_stranger_s_markup_is_escaped(page):
    outside = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "No baselines on vision features: &lt;b&gt;no room." in outside
    assert "<b>" not in outside and "&lt;b&gt;&amp;amp;&lt;/script&gt;" in outside
    assert page.count("</script>") == page.count("<script")


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]+""", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    )
    assert not re.findall(r"@import|url\((?!data:)", page)


def test_our_scripts_do_not_end_their_own_element():
    assert not [file.name for file in FOLDER.glob("*.js") if re.search(r"</script|<!--", file.read_text())]


def test_the_chart_library_comes_with_its_licence(page):
    assert "Copyright (c) 2022 Leon Sorokin" in page and "The MIT License" in page


def test_texts_become_elements_by_their_content_alone():
    """No script of the page has a way to make markup of a text."""
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|setHTML|\beval\b|new Function"
    )
    own = [file for file in FOLDER.glob("*.js") if not file.name.startswith("uPlot")]
    assert len(own) == 8
    assert not [file.name for file in own if re.search(ways, file.read_text())]

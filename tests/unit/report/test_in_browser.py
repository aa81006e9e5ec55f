"""The page in a real browser: what a stranger wrote stays text, and what a reader clicks is shown."""

import pytest

from benchmarks.chromium import Chromium, find_chromium
from rft_cluster.common.errors import UserError
from rft_cluster.report.__main__ import main
from rft_cluster.run.history import read_history
from tests.unit.report.whole import written

HOSTILE = (
    "</script><script>window.struck = 1</script><!-- <img src=x onerror='window.struck = 2'> {{ 7 * 7 }} "
    "\" ' onclick=window.struck=3 \x1b[31mred\x1b[0m \u202egnp.exe\u2066 \u2028 \u0378 javascript:window.struck=4"
)
FORMULA = '=HYPERLINK("http://example.org","click")'

pytestmark = pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def hostile(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    run = written(folder, HOSTILE, name="<b>mine<!--")
    assert main([str(run), "--quick"]) == 0
    browser.messages.clear()
    browser.open(run / "report.html")
    return browser


def visible(browser) -> str:
    return browser.run("document.querySelector('main').textContent")  # off the screen, too


def test_nothing_of_a_stranger_s_runs_and_nothing_is_loaded(hostile):
    hostile.run("document.querySelectorAll('button').forEach(one => one.id !== 'csv' && one.click())")
    assert hostile.run("window.struck ?? 'safe'") == "safe"
    assert hostile.messages == [], "neither an error nor something that the policy had to refuse"
    assert [address for address in hostile.requests if not address.startswith(("file:", "data:"))] == []
    assert hostile.run("document.querySelectorAll('script').length") == 2, "the page's own: its data are unpacked"
    assert hostile.run("document.querySelectorAll('img:not([src^=\"data:image/webp\"])').length") == 0


def test_hostile_text_is_shown_as_text(hostile):
    hostile.run("document.querySelector('dialog').close()")
    text = visible(hostile)
    for told in ("<script>window.struck = 1</script>", "<img src=x onerror=", "{{ 7 * 7 }}", "<b>mine<!--"):
        assert told in text
    escapes = ("\x1b", "\\x1b[31mred"), ("\u202e", "\\u202egnp.exe"), ("\u2066", "\\u2066"), ("\u0378", "\\u0378")
    for hidden, escape in escapes:  # the last one is of no character: both halves of the page escape it
        assert hidden not in text
        assert escape in text


def test_the_policy_holds_where_escaping_would_not(hostile):
    """Markup in the page still could not run, nor load, nor send."""
    hostile.run("document.body.insertAdjacentHTML('beforeend', \"<img src=x onerror='window.struck = 5'>\")")
    hostile.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.struck = 6'}))")
    assert hostile.run("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"
    assert hostile.run("window.struck ?? 'safe'") == "safe"
    assert any("Content Security Policy" in message for message in hostile.messages)


def test_the_browser_of_rollouts_filters_by_all_that_it_names(browser, tmp_path):
    run = written(tmp_path)
    assert main([str(run), "--quick"]) == 0
    browser.open(run / "report.html")

    def found(*changes: str) -> str:
        browser.run("document.getElementById('filters').reset()")
        for change in changes:
            browser.run(f"document.getElementById('filters').{change}")
        browser.run("document.getElementById('filters').dispatchEvent(new Event('input'))")
        return browser.run("document.getElementById('found').textContent")

    assert found() == "8 completions in 4 groups"
    assert found("label.value = '0'") == "4 completions in 2 groups"
    assert found("answer.value = '1'") == "4 completions in 4 groups"
    assert found("reward.value = 'none'") == "2 completions in 2 groups"
    assert found("group.value = 'equal'") == "4 completions in 2 groups"
    assert found("from.value = '2'", "to.value = '2'") == "4 completions in 2 groups"
    assert found("text.value = 'ROSE'") == "4 completions in 4 groups"
    assert found("text.value = 'yellow'") == "4 completions in 2 groups", "by the image's name"
    assert found("text.value = 'no such'") == "Nothing matches."
    assert found("label.value = '0'", "answer.value = '0'", "from.value = '2'") == "1 completions in 1 groups"
    assert browser.run("[...document.querySelectorAll('.answer.other')].length") == 1, "its neighbour is paler"


def test_cells_and_images_open(browser, tmp_path):
    run = written(tmp_path)
    assert main([str(run), "--quick"]) == 0
    browser.open(run / "report.html")
    assert browser.run("[...document.querySelectorAll('.matrix button')].map(one => one.ariaLabel)") == [
        "rose, answered rose: 2 of 2",
        "tulip, answered tulip: 2 of 2",
    ]
    browser.run("document.getElementById('evaluation').value = 0")
    browser.run("document.getElementById('evaluation').dispatchEvent(new Event('change'))")
    browser.run("document.querySelector('[aria-label=\"tulip, answered rose: 2 of 2\"]').click()")
    assert "green" in browser.run("document.getElementById('cell').innerText")
    assert browser.run("document.querySelectorAll('#cell img').length") == 2
    browser.run("document.querySelector('#groups button.picture').click()")
    history = browser.run("document.getElementById('image-body').innerText")
    assert "step 1" in history and "step 2" in history
    assert browser.run("document.querySelectorAll('#image-body .squares i').length") == 4


def test_a_table_for_spreadsheets_has_no_formula(browser, tmp_path):
    run = written(tmp_path, FORMULA)
    assert main([str(run), "--quick"]) == 0
    browser.open(run / "report.html")
    browser.run("{const make = URL.createObjectURL; URL.createObjectURL = (blob) => (window.saved = blob, make(blob))}")
    browser.run("document.getElementById('csv').click()")
    lines = browser.run("window.saved.text()").splitlines()
    assert lines[0].startswith("step,image,label,answer,reward,format,accuracy,advantage")
    assert len(lines) == 1 + 8
    assert browser.run("window.saved.text()").count("'=HYPERLINK") >= 8, "the labels"
    cells = [cell for line in lines[1:] for cell in line.split(",")]
    assert not [cell for cell in cells if cell.lstrip('"').startswith(("=", "@"))]


def test_the_page_prints(browser, tmp_path):
    run = written(tmp_path)
    assert main([str(run), "--quick"]) == 0
    browser.open(run / "report.html")
    assert browser.pdf().startswith(b"%PDF-")


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    with pytest.raises(UserError):
        read_history(tmp_path)

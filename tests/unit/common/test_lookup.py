"""A slip in a file of the user's own: one message with file, line, the exception, and their frames alone."""

import itertools

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import find_function

# What may be wrong in a module, the exception it makes, and the line that it is on.
SLIPS = {
    "def f(prompt, completion)\n    return 1\n": ("SyntaxError: expected ':'", 1),
    "x = (1,\ny = 2\n": ("SyntaxError", 1),
    "def f():\nreturn 1\n": ("IndentationError", 2),
    "def f():\n\tif 1:\n        return 1\n": ("TabError", 3),
    "# a comment\nimport something_missing\n": ("ModuleNotFoundError: No module named 'something_missing'", 2),
    "from math import cosine\n": ("ImportError: cannot import name 'cosine'", 1),
    "\n\nx = nope\n": ("NameError: name 'nope' is not defined", 3),
    "1 / 0\n": ("ZeroDivisionError: division by zero", 1),
    "open('no such file')\n": ("FileNotFoundError", 1),
    "import json\nx = json.loads('{')\n": ("json.decoder.JSONDecodeError", 2),
    "raise SystemExit(3)\n": ("SystemExit: 3", 1),
    "class Own(Exception): pass\nraise Own('a\\nb')\n": ("Own: a", 2),
    "assert 1 > 2\n": ("AssertionError", 1),
    "def g(): return g()\ng()\n": ("RecursionError", 1),
}
NUMBER = itertools.count()


@pytest.mark.parametrize("key", ["rewards", "data.source"])
@pytest.mark.parametrize("depth", [0, 1, 2], ids=["itself", "what it imports", "what that imports"])
@pytest.mark.parametrize("source", SLIPS, ids=[slip[0].split(":")[0] for slip in SLIPS.values()])
def test_a_slip_in_the_users_module(tmp_path, monkeypatch, source, depth, key):
    text, line = SLIPS[source]
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"own_{next(NUMBER)}" for _ in range(depth + 1)]
    for name, imported in itertools.pairwise(names):
        (tmp_path / f"{name}.py").write_text(f"import {imported}\n")
    (tmp_path / f"{names[-1]}.py").write_text(source)
    with pytest.raises(UserError) as caught:
        find_function(f"{names[0]}:f", {}, key)
    message = str(caught.value)
    assert message.startswith(f"{key}: '{names[0]}:f': {names[-1]}.py, line {line}: ")
    assert text in message.splitlines()[0]
    for name in names[:-1]:
        assert f'{name}.py", line 1' in message  # how it came to be imported
    for foreign in ("importlib", "lookup.py", "json/decoder.py", "Traceback"):
        assert foreign not in message


@pytest.mark.parametrize("source", [b"\xff\xfe", b"x = '\xe9'\n", b"\0"])
def test_a_file_that_is_no_python(tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{next(NUMBER)}"
    (tmp_path / f"{name}.py").write_bytes(source)
    # Until Python 3.11.3, Debian 12's, a null byte is a ValueError.
    with pytest.raises(UserError, match=rf"^rewards: '{name}:f': .*(SyntaxError|ValueError: source code)"):
        find_function(f"{name}:f", {}, "rewards")


def test_ctrl_c_while_it_is_imported_stops_the_program(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_slow.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        find_function("own_slow:f", {}, "rewards")

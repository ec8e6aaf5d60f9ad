"""A disk cache of a fixed teacher's activations for each clip, so that later epochs and runs need not compute them."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from linconv.conversion import ConvertedModel, families
from linconv.distillation.augmentation import SharedSpecAugment
from linconv.distillation.heads import Head
from linconv.distillation.schedules import Mode, TargetGuided, Unguided

__all__ = ["ActivationCache", "check_cacheable"]

SHARD_BYTES = 256 << 20
SPARED = 0.05  # fraction of the disk that is left free

logger = logging.getLogger(__name__)


def check_cacheable(student: PreTrainedModel, teacher: PreTrainedModel | None, mode: Mode) -> None:
    """Checks that a clip always gives the same teacher activations.

    Raises:
        ValueError: there is no teacher, or it changes, uses dropout or gets SpecAugment; the message says what to do.
    """
    if teacher is None:
        raise ValueError("teacher_cache: got a folder but no teacher; want both, or None")
    if not isinstance(mode.guide, TargetGuided | Unguided):
        raise ValueError(
            f"teacher_cache: the teacher of {mode.guide} changes during training; want None, or TargetGuided"
        )
    if SharedSpecAugment.is_on(student):
        raise ValueError(
            "teacher_cache: the teacher gets the student's SpecAugment, drawn anew for each batch; want None, or "
            "apply_spec_augment=False in the student's config"
        )
    drawing = [name for name, m in teacher.named_modules() if m.training and getattr(m, "p", 0)]
    if drawing:
        raise ValueError(f"teacher_cache: {drawing[0]} of the teacher draws dropout; want None, or teacher.eval()")


class ActivationCache:
    """Hidden states (bfloat16) and logits (in their dtype) of each clip or sentence, in safetensors shards in a folder.

    The key of a clip is a hash of its content, so it is found in any order of the data and in batches of any size and
    padding. The key of the teacher is a hash of its weights and config, which names a subfolder of ``folder``. If
    padding affects the hidden states (group normalization over time, stock models without the masks that conversion
    adds), the padded length is part of a clip's key.

    Training always gets the stored, rounded values, also the first time, so a run with a warm cache is the same, bit
    for bit, as the one that filled it.

    Args:
        folder: created at the first write; several teachers and processes may share it.
        teacher: in evaluation mode.
        head: that of the student.
        precision: of the forward pass, such as "bf16" for autocast, or "own" for the weights' dtype.
        embeddings: whether to store the input of the first layer too.
    """

    def __init__(self, folder: str | Path, teacher: PreTrainedModel, head: Head, *, precision: str, embeddings: bool):
        self.folder = Path(folder) / _fingerprint(teacher, precision, embeddings)
        self.head, self.main_input = head, teacher.main_input_name
        # Where conversion changes a stock forward pass, it does so to keep padding out.
        stock = families.of(teacher).overrides is not None and not isinstance(teacher, ConvertedModel)
        self.padding_leaks = stock or getattr(teacher.config, "feat_extract_norm", None) == "group"
        self._new: dict[str, dict[str, Tensor]] = {}
        self._new_bytes, self._full = 0, False
        self._shards: dict[str, tuple[safe_open, list[str]]] = {}  # key of a clip to (shard, names of its tensors)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._shards.keys() | self._new.keys())

    # ---- Batches

    def keys(self, inputs: dict[str, Tensor], frames: Tensor) -> list[str]:
        """The key of each clip of a batch.

        Args:
            inputs: the batch from the collator.
            frames: (batch,) valid frames of the hidden states.
        """
        given = dict(sorted(self.head.sequences(inputs).items()))
        mask, length = given.get("attention_mask"), given[self.main_input].shape[-1]
        given = {n: x.cpu() for n, x in given.items()}
        found = []
        for row, count in enumerate(frames.tolist()):
            digest = hashlib.sha256(str(count).encode())
            valid = length if mask is None or self.padding_leaks else int(mask[row].sum())
            if mask is not None and not bool(mask[row, :valid].all()):
                valid = length  # not padded on the right: the whole row counts
            for name, x in given.items():
                own = x[row, ..., :valid] if x.shape[-1] == length and x.dim() > 1 else x[row]
                digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
                digest.update(_bytes(own))
            found.append(digest.hexdigest()[:32])
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._shards

    def add(self, keys: list[str], frames: Tensor, states: list[Tensor], logits: Tensor) -> None:
        """Stores the teacher's outputs for the clips of a batch that are not in the cache yet.

        Args:
            keys, frames: as for :meth:`keys`.
            states: (batch, L, d) each.
            logits: (batch, ...), from ``Head.logits``; each of several choices is a row, like a clip.
        """
        for row, (key, count) in enumerate(zip(keys, frames.tolist())):
            if key in self:
                continue
            entry = {f"{i}": state[row, :count].to("cpu", torch.bfloat16) for i, state in enumerate(states)}
            entry["logits"] = (logits[row, :count] if self.head.of_frames else logits[row]).to("cpu", copy=True)
            self._new[key] = {name: x.contiguous() for name, x in entry.items()}
            self._new_bytes += sum(x.nbytes for x in entry.values())
        if self._new_bytes >= SHARD_BYTES:
            self.flush(keep=keys)

    def batch(self, keys: list[str], length: int, device, *, with_states: bool) -> tuple[list[Tensor], Tensor]:
        """The hidden states, (batch, L, d) each, and the logits of cached clips; zero at padding.

        Args:
            keys: one per clip.
            length: L, the padded length in frames.
            with_states: whether to return hidden states; otherwise the list is empty.
        """
        rows = [self._entry(key) for key in keys]
        names = sorted((n for n in rows[0].names if n != "logits"), key=int) if with_states else []
        states = [_stack([row[name] for row in rows], length).to(device) for name in names]
        logits = [row["logits"] for row in rows]
        return states, (_stack(logits, length) if self.head.of_frames else torch.stack(logits)).to(device)

    def _entry(self, key: str) -> "_Entry":
        if key in self._new:
            own = self._new[key]
            return _Entry(own.keys(), own.__getitem__)
        shard, names = self._shards[key]
        return _Entry(names, lambda name: shard.get_tensor(f"{key}/{name}"))

    # ---- Disk

    def flush(self, keep: list[str] = ()) -> None:
        """Writes the entries that are not on disk yet. If the disk is nearly full, drops them with a warning.

        Args:
            keep: keys of the clips that are needed next; they are not dropped.
        """
        if not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)  # not earlier: reading alone creates nothing
        disk = shutil.disk_usage(self.folder)
        if disk.free - self._new_bytes < SPARED * disk.total:
            if not self._full:
                logger.warning(
                    "teacher_cache: %s is nearly full; what is not in the cache yet is computed each time. Free some "
                    "room, or give another folder",
                    self.folder,
                )
            self._full = True
            self._new = {key: self._new[key] for key in keep if key in self._new}
            self._new_bytes = sum(x.nbytes for entry in self._new.values() for x in entry.values())
            return
        tensors = {f"{key}/{name}": x for key, entry in self._new.items() for name, x in entry.items()}
        path = self.folder / f"{os.urandom(8).hex()}.safetensors"
        # Renamed only when complete: other processes may read the folder, and this one may be killed.
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished)
        unfinished.rename(path)
        self._open(path)
        self._new, self._new_bytes = {}, 0

    def _open(self, path: Path) -> None:
        shard = safe_open(path, "pt")
        names: dict[str, list[str]] = {}
        for name in shard.keys():  # noqa: SIM118  not a dictionary
            key, _, part = name.partition("/")
            names.setdefault(key, []).append(part)
        for key, parts in names.items():
            self._shards[key] = shard, parts


class _Entry:
    """The stored tensors of one clip, each read on access."""

    def __init__(self, names, read):
        self.names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)


def _stack(rows: list[Tensor], length: int) -> Tensor:
    """Rows of (frames, d) each, zero-padded to (batch, length, d)."""
    stacked = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for target, row in zip(stacked, rows):
        target[: len(row)] = row
    return stacked


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _fingerprint(teacher: PreTrainedModel, precision: str, embeddings: bool) -> str:
    digest = hashlib.sha256()
    # The folder and the version in the config do not affect the outputs.
    config = {k: v for k, v in teacher.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    about = [type(teacher).__name__, config, precision, embeddings, str(teacher.device.type)]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, x in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(_bytes(x.detach().cpu()))
    return digest.hexdigest()[:32]

"""The order of examples: batches of like lengths, and what their lengths are known from."""

import numpy as np
import pytest
import torch

from linconv.distillation import DistillationArguments, DistillationTrainer
from linconv.distillation.sampling import LikeLengths

from .run import Noise, arguments, collate, models

BATCH = 4


def lengths(count=128):
    return np.random.default_rng(0).permutation(np.geomspace(20, 2000, count).astype(int)).tolist()


def padding(order, lengths) -> float:
    """The share of an epoch's frames that is padding."""
    batches = [[lengths[i] for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)


def test_batches_of_like_lengths_are_padded_less_and_have_each_example_once():
    known = lengths()
    orders = [list(LikeLengths(known, BATCH, seed=0, epoch=lambda epoch=epoch: epoch)) for epoch in range(2)]
    random = torch.randperm(len(known)).tolist()
    for order in orders:
        assert sorted(order) == list(range(len(known)))
        assert padding(order, known) < 0.25 < 0.5 < padding(random, known)
    assert orders[0] != orders[1] and orders[0] != list(LikeLengths(known, BATCH, seed=7, epoch=lambda: 0))


def test_a_draw_follows_from_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = list(LikeLengths(lengths(), BATCH, seed=3, epoch=lambda: 5))
    torch.manual_seed(2)
    assert first == list(LikeLengths(lengths(), BATCH, seed=3, epoch=lambda: 5))


def by_length(folder, data=None, lengths=None, **changes):
    return DistillationTrainer(
        models()[1],
        arguments(folder, train_sampling_strategy="group_by_length", **changes),
        lengths=lengths,
        train_dataset=Noise() if data is None else data,
        eval_dataset=Noise(6),
        data_collator=collate,
    )


def test_evaluation_stays_in_order(tmp_path):
    made = by_length(tmp_path, lengths=list(range(24)), per_device_eval_batch_size=4)
    assert list(made.get_eval_dataloader().batch_sampler) == [[0, 1, 2, 3], [4, 5]]
    assert sorted(i for batch in made.get_train_dataloader().batch_sampler for i in batch) == list(range(24))


def test_groups_are_of_steps_of_all_processes(tmp_path, monkeypatch):
    made = by_length(tmp_path, lengths=list(range(24)), gradient_accumulation_steps=2)
    monkeypatch.setattr(DistillationArguments, "world_size", 3)
    assert made._get_train_sampler().batch_size == 3 * 2 * made.args.per_device_train_batch_size


def test_each_epoch_is_drawn_anew_with_the_seed_of_the_data(tmp_path):
    class Seen(Noise):
        order = []

        def __getitem__(self, i):
            self.order.append(i)
            return super().__getitem__(i)

    by_length(tmp_path, Seen(), list(range(24)), num_train_epochs=2, max_steps=-1, data_seed=4).train()
    for epoch, order in enumerate((Seen.order[:24], Seen.order[24:])):
        assert order == list(LikeLengths(list(range(24)), BATCH, seed=4, epoch=lambda epoch=epoch: epoch))


def test_lengths_of_a_data_set_are_looked_for_up_to_its_end(tmp_path):
    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            assert i < 9, "read on and on"
            return {"input_ids": [0] * (i + 1)}

    assert by_length(tmp_path, Endless())._get_train_sampler().lengths == [1, 2, 3]


def test_lengths_that_the_examples_have_are_found(tmp_path):
    """As by the stock Trainer: in a column, or by what the model is given."""
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"seconds": [3.0, 1.0, 2.0]})
    made = by_length(tmp_path, column, length_column_name="seconds")
    assert list(made._get_train_sampler().lengths) == [3.0, 1.0, 2.0]
    ids = [{"input_ids": [0] * n} for n in (5, 2)]
    assert by_length(tmp_path, ids)._get_train_sampler().lengths == [5, 2]


def test_lengths_that_are_not_known_are_named(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (Noise()[i] for i in range(24))

    with pytest.raises(ValueError, match=r"train_sampling_strategy: got group_by_length, .*\(Stream\) that is str"):
        by_length(tmp_path, Stream())
    with pytest.raises(ValueError, match="lengths: got None; want one for each example of train_dataset"):
        by_length(tmp_path).train()
    with pytest.raises(ValueError, match="lengths: got 3; want 24, one for each training example"):
        by_length(tmp_path, lengths=[1, 2, 3]).train()

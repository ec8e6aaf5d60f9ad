"""Data sets on the hub, loaded with the package datasets."""

from collections.abc import Iterator

from linconv.data.holdout import SPLITS
from linconv.errors import UserError, first_of, no_folder, unknown
from linconv.recipe import Data

__all__ = ["class_name", "class_names", "load_from_hub"]


def load_from_hub(data: Data, columns: dict[str, str], **options) -> Iterator[tuple[str, object]]:
    """Yields each of the three splits that ``data`` names with its data set, or None if the hub lacks that split.

    Args:
        columns: required columns, with the recipe key of each.
        options: more options of ``datasets.load_dataset``.

    Raises:
        UserError: something that ``data`` names does not exist; the message names it and the nearest match. Or a row
            of a data set that is not streamed has null in one of the columns.
    """
    absent = no_folder("data.path", data.path)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{absent}; for a data set on the hub, pip install 'linconv[hub]'") from None
    try:
        available = datasets.get_dataset_split_names(data.path, data.name)
    except Exception as error:  # its many back ends raise all kinds of errors
        raise UserError(f"{absent}, and no such data set on the hub: {' '.join(str(error).split())[:200]}") from error
    if data.train not in available:
        raise unknown("data.train", data.train, available)
    for split in SPLITS:
        name, dataset = getattr(data, split), None
        if name in available:
            dataset = datasets.load_dataset(data.path, data.name, split=name, **options)
            for column, what in columns.items():
                if column not in dataset.features:
                    raise unknown(what, column, dataset.features)
                if isinstance(dataset, datasets.Dataset):
                    _check_filled(dataset.data.column(column), f"{what}: column {column!r} of the split {name}")
        yield split, dataset


def _check_filled(cells, what: str) -> None:
    if cells.null_count:  # stored as metadata: no cell is read
        empty = [f"row {row}" for row, null in enumerate(cells.is_null().to_pylist()) if null]
        counted = f"{len(empty):,} of {len(cells):,} rows"
        raise UserError(f"{what}: null in {counted}, {first_of(empty)} (from 0 on); want a value in every row")


def class_name(feature, value) -> str:
    """Returns the name of a class, which the hub may store as a number."""
    return feature.int2str(value) if hasattr(feature, "int2str") else str(value)


def class_names(feature) -> list[str] | None:
    """Returns all classes in the hub's order, or None if it does not list them."""
    return list(feature.names) if hasattr(feature, "int2str") else None

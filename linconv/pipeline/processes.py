"""Work that one of several processes does for all."""

from collections.abc import Callable
from typing import Any

import torch

from linconv.distillation import DistillationArguments
from linconv.errors import UserError


def by_main_process(args: DistillationArguments, function: Callable[[], Any]) -> Any:
    """Calls ``function`` in the main process; all processes return its result or raise its UserError."""
    if args.world_size == 1:
        return function()
    outcome: list = [None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[0] = error
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]

import os

# No test reaches for the network, and none shares the processor with its neighbours more than it must.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Results start as NaN: an element that a kernel forgets to write is seen.
os.environ.setdefault("LINCONV_POISON", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

import gc
import os

# No test reaches for the network, and none shares the processor with its neighbours more than it must.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Results start as NaN: an element that a kernel forgets to write is seen.
os.environ.setdefault("LINCONV_POISON", "1")

import pytest
from hypothesis import Phase, settings

# On a GPU a new shape may be minutes of compilation: the first example that fails is told as it is.
settings.register_profile("gpu", phases=(Phase.explicit, Phase.reuse, Phase.generate))


# At the end one process would work on them, or two on what they set up, while the others have nothing to do.
FIRST = ("test_triton.py", "test_cuda_on_host.py", "test_demo.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="module", autouse=True)
def keep_what_stays():
    """What was imported or compiled stays, so searches for garbage, one with each training, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # for what is told of objects that outlive Python


# Of what pytest-xdist starts, the process that hands out the tests does not wait for torch.


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only lose by sharing their work out."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

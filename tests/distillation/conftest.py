import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by sharing their work out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""What tests of small models share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Computes on one thread: for small tensors more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

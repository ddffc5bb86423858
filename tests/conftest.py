"""Shared by all tests: the project's folder on the path, and the devices that this machine has."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)        # the tensors are tiny: one thread is faster, and its bits are the same on every machine


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return torch.device(request.param)

"""Whether there is a GPU."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()
requires_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

"""Where tests step: on the host, by the path of an accelerator on the CPU, and on a GPU if any."""

from __future__ import annotations

import pytest
import torch

ACCELERATORS = [None, "cpu", "cuda"]


def there(name: str | None) -> str | None:
    """The accelerator of that name; without it the test is skipped."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("NO GPU: what a CUDA graph computes is tested where torch finds a device")
    return name

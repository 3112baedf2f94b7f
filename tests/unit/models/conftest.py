"""Fixtures of the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(network, tmp_path) -> Path:
    return network.write(tmp_path)

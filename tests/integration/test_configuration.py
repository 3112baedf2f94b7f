"""The configuration file, seen from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.commands import Done, complaint

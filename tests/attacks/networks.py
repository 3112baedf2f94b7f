"""The models of the servers under attack: a plain one, and one that needs to know the time."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.honest import MODEL
from tests.networks import Network, make_network

CLOCK = "clock"
"""One input, and a calendar."""


def write_networks(root: Path) -> Network:
    """Writes both, and returns the plain one."""
    clock = make_network(CLOCK, inputs=3, outputs=1, seed=5)
    clock.manifest.update(
        step_interval_seconds=300.0,
        inputs=[{"name": "x"}],
        outputs=[{"name": "x", "horizons": [1]}],
        calendar=[{"kind": "fourier", "period_seconds": 86_400, "harmonics": 1}],
    )
    clock.write(root)
    plain = make_network(MODEL, seed=1)
    plain.write(root)
    return plain

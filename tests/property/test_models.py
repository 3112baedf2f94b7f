"""What `write_model` accepts a server serves: whatever is written loads, is built and steps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from benchmarks.bare import BareForward
from stepstate.engine import Engine, EngineSettings
from stepstate.errors import ModelInvalid
from stepstate.models import Manifest, build_timeline, load_model, write_model
from stepstate.models.tensors import tensor_shapes
from tests.hypothesis_profiles import examples

PERIODS = st.one_of(
    st.integers(1, 10**10),
    st.floats(1e-7, 1e10, allow_nan=False),
    st.sampled_from([86_400, 604_800, 31_557_600, 44_714.16, 0.1, 1 / 3]),
)
GOOD = st.sampled_from([1, 1.0, -2.5, 1e-20, 1e20, np.float32(3)])
SCALES = st.one_of(GOOD, GOOD, GOOD, st.sampled_from([0, 1e300, float("nan"), "1"]))
SMALL = st.one_of(st.integers(1, 5), st.integers(2, 4), st.integers(-1, 5))
CALENDAR = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("fourier"), "period_seconds": PERIODS, "harmonics": st.integers(0, 9)}
    ),
    st.just({"kind": "day_of_week"}),
)
LAGS = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("lag"),
            "input": st.sampled_from(["a", "a", "c"]),
            "steps": st.lists(SMALL, max_size=3),
            "into": st.sampled_from(["cell", "head"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("rolling"),
            "input": st.sampled_from(["a", "a", "b"]),
            "steps": SMALL,
            "statistic": st.sampled_from(["mean", "min", "max"]),
            "into": st.sampled_from(["cell", "head"]),
        }
    ),
)
INPUT = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"])},
    optional={"mean": SCALES, "scale": SCALES, "profile": st.sampled_from(["p", "q"])},
)
OUTPUT = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "y"])},
    optional={
        "mean": SCALES,
        "scale": SCALES,
        "profile": st.just("p"),
        "horizons": st.lists(SMALL, max_size=3),
        "quantiles": st.sampled_from([[], [0.1, 0.5, 0.9], [0.5], [0.9, 0.5, 0.1]]),
    },
)
PROFILE = st.fixed_dictionaries(
    {
        "period_steps": SMALL,
        "origin": st.sampled_from(["2026-01-01", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59Z"]),
    }
)
MANIFESTS = st.fixed_dictionaries(
    {
        "format": st.just("stepstate.model/1"),
        "name": st.just("m"),
        "version": st.sampled_from(["1", 1]),
        "cell": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["lstm", "gru", "rnn_tanh", "rnn_relu"]),
                "hidden_size": st.integers(1, 4),
                "num_layers": st.integers(1, 2),
            },
            optional={"proj_size": st.integers(0, 3)},
        ),
        "inputs": st.lists(INPUT, min_size=1, max_size=2),
        "outputs": st.lists(OUTPUT, min_size=1, max_size=2),
    },
    optional={
        "step_interval_seconds": PERIODS,
        "calendar": st.lists(CALENDAR, max_size=2),
        "lags": st.lists(LAGS, max_size=2),
        "profiles": st.dictionaries(st.sampled_from(["p", "q", "head.x"]), PROFILE, max_size=2),
        "fallback": st.sampled_from(["level", "first"]),
        "tracking": st.fixed_dictionaries({"horizons": st.lists(SMALL, max_size=2)}),
    },
)


def tensors_of(document: dict[str, object]) -> dict[str, np.ndarray]:
    """Weights that fit, if the manifest itself is one."""
    try:
        shapes = tensor_shapes(Manifest.model_validate(document))
    except ValueError:
        return {}
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


class Nobody:
    """Is told of nothing: no row is queued."""


@examples(300)
@given(document=MANIFESTS)
def test_what_is_written_is_served(document):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "m" / "1"
        try:
            write_model(folder, document, tensors_of(document))
        except ModelInvalid:
            event("refused")
            assert not folder.exists()
            return
        event("written")
        model = load_model(folder)
        engine = Engine(
            model,
            build_timeline(model),
            EngineSettings(capacity=2, batch_rows=2, chunk_rows=2),
            sink=Nobody(),
            observer=Nobody(),
        )
        assert engine.used_slots == 0
        forward = BareForward(model, 3)
        x = np.zeros((3, model.manifest.input_width), np.float32)
        for t in (0, 1, 10_000_000):
            y = forward.step(np.arange(3), x, t)
            assert y.shape == (3, model.manifest.output_width)

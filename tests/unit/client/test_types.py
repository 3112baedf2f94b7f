from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from stepstate.client import ModelInfo, Output, Result, SessionInfo
from stepstate.errors import InvalidField, SessionClosed


def model(*inputs: str) -> ModelInfo:
    return ModelInfo(
        name="m",
        version="1",
        description="",
        fingerprint="",
        cell="lstm",
        hidden_size=4,
        num_layers=1,
        inputs=dict.fromkeys(inputs, ""),
        outputs=(Output("y", "", (0, 1)), Output("z", "", (3,))),
        step_interval=timedelta(hours=1),
        needs_start_time=False,
    )


ONE, THREE = model("a"), model("a", "b", "c")
TABLE = [[1, 2, 3], [4, 5, 6]]
FRAME = pd.DataFrame(TABLE, columns=["a", "b", "c"])


@pytest.mark.parametrize(
    ("known", "x", "rows", "alone"),
    [
        (ONE, 7, [[7]], True),
        (ONE, np.float64(7), [[7]], True),
        (ONE, [7], [[7]], True),
        (ONE, [[7]], [[7]], False),
        (ONE, [7, 8, 9], [[7], [8], [9]], False),
        (ONE, [[7], [8]], [[7], [8]], False),
        (ONE, pd.Series([7, 8]), [[7], [8]], False),
        (ONE, pd.DataFrame({"a": [7, 8]}), [[7], [8]], False),
        (THREE, (1, 2, 3), [[1, 2, 3]], True),
        (THREE, np.array(TABLE), TABLE, False),
        (THREE, [[1, 2, 3]], [[1, 2, 3]], False),
        (THREE, FRAME, TABLE, False),
        (THREE, FRAME[["c", "a", "b"]], TABLE, False),
        (THREE, FRAME.iloc[0], [[1, 2, 3]], True),
    ],
)
def test_rows_are_taken_in_every_usual_shape(known, x, rows, alone):
    found, one = known.rows(x)
    assert found.dtype == np.float32
    assert found.tolist() == rows
    assert one is alone


@pytest.mark.parametrize(
    ("known", "x", "shape"),
    [
        (ONE, [], "[0]"),
        (ONE, [[1, 2]], "[1, 2]"),
        (ONE, [[[1]]], "[1, 1, 1]"),
        (THREE, 1, "[]"),
        (THREE, [1, 2], "[2]"),
        (THREE, [1, 2, 3, 4, 5, 6], "[6]"),
        (THREE, np.zeros((0, 3)), "[0, 3]"),
        (THREE, np.zeros((3, 2)), "[3, 2]"),
        (THREE, np.zeros((1, 2, 3)), "[1, 2, 3]"),
        (THREE, FRAME[["a", "b"]], "the columns a, b"),
        (THREE, FRAME.rename(columns={"c": "d"}), "the columns"),
        (THREE, [[1, 2, 3], [1]], "not an array of numbers"),
        (THREE, "many", "not an array of numbers"),
    ],
    ids=str,
)
def test_another_shape_is_refused_with_both(known, x, shape):
    with pytest.raises(InvalidField) as refused:
        known.rows(x)
    assert shape in str(refused.value)
    if "not an array" not in shape:
        assert ", ".join(known.inputs) in str(refused.value)


def test_a_number_beyond_float32_is_infinite_without_a_warning():
    assert ONE.rows(1e39)[0].tolist() == [[np.inf]]


def test_the_widths_are_those_of_x_and_y():
    assert (THREE.input_width, THREE.output_width) == (3, 3)


def test_each_quantile_of_each_horizon_is_a_column():
    output = Output("y", "", (0, 1), (0.1, 0.5, 0.9))
    assert (output.width, Output("z", "", (3,)).width) == (6, 1)
    assert replace(THREE, outputs=(output, *THREE.outputs)).output_width == 9


def test_an_error_names_the_field_that_the_rows_were_given_as():
    with pytest.raises(InvalidField, match=r"^history: has shape"):
        THREE.rows([1, 2], "history")
    with pytest.raises(InvalidField, match=r"^history: is not an array"):
        THREE.rows("many", "history")


def test_a_session_of_an_older_server_has_no_accuracy():
    told = SessionInfo.__dataclass_fields__
    assert (told["accuracy"].default, told["missing"].default) == ((), "")
    assert not told["drift"].default.drifting


def test_a_result_is_outputs_or_an_error_that_is_raised_where_outputs_are_taken():
    y = np.zeros(3, np.float32)
    assert Result("session", y, None).y is y
    closed = SessionClosed("a", 3)
    failed = Result("session", None, closed)
    assert failed.error is closed
    with pytest.raises(SessionClosed) as raised:
        _ = failed.y
    assert raised.value is closed

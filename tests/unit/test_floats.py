from __future__ import annotations

import numpy as np
import pytest

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import put_floats, x_of, y_of

SIZES = [0, 1, 2, 31, 32, 63, 64, 65, 66, 4095, 4096, 10_000]
X, Y = pb.StepRequest.X_FIELD_NUMBER, pb.StepResponse.Y_FIELD_NUMBER


def values(count: int) -> np.ndarray:
    """Any bits but those of NaN."""
    drawn = np.random.default_rng(count).integers(0, 2**32, count, np.uint32).view(np.float32)
    return np.where(np.isnan(drawn), np.float32(-0.0), drawn)


@pytest.mark.parametrize("count", SIZES)
def test_values_make_the_round_trip_to_the_bit(count):
    sent = values(count)
    request = pb.StepRequest(session_id="a", t=5, last_only=True)
    put_floats(request, X, sent.tobytes())
    request = pb.StepRequest.FromString(request.SerializeToString())
    assert x_of(request).tobytes() == sent.tobytes()
    assert (request.session_id, request.t, request.last_only) == ("a", 5, True)


@pytest.mark.parametrize("count", SIZES)
def test_outputs_make_the_round_trip_to_the_bit_beside_layers(count):
    sent = values(count)
    response = pb.StepResponse(session_id="a", t=5)
    put_floats(response, Y, sent.tobytes())
    put_floats(response.layers.add(), pb.LayerTrace.H_FIELD_NUMBER, values(99).tobytes())
    response = pb.StepResponse.FromString(response.SerializeToString())
    assert y_of(response).tobytes() == sent.tobytes()
    assert np.float32(response.layers[0].h).tobytes() == values(99).tobytes()


@pytest.mark.parametrize("count", SIZES)
def test_the_bytes_are_those_that_protobuf_writes(count):
    ours, theirs = pb.StepRequest(), pb.StepRequest(x=values(count).tolist())
    put_floats(ours, X, values(count).tobytes())
    assert ours.SerializeToString() == theirs.SerializeToString()


@pytest.mark.parametrize("count", [1, 64, 65, 10_000])
def test_what_is_read_belongs_to_the_reader(count):
    response = pb.StepResponse(y=values(count).tolist())
    y = y_of(response)
    y[0] = 1.0
    assert y[0] == 1.0

"""A server whose weights have fewer bits says at start what that does, and then steps so."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import running_server
from tests.unit.rig import rows_of

DIFFERS = "outputs differ from float32's, in units of their scale in the manifest"


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
async def test_the_loss_is_logged_for_each_model_and_outputs_stay_near(
    config: ServerConfig, networks, caplog: pytest.LogCaptureFixture, weights: str
):
    caplog.set_level(logging.INFO, "stepstate.server")
    async with (
        running_server(replace(config, weights=weights)) as server,
        AsyncClient(server.address) as client,
    ):
        models = [model.key for model in server.sessions.catalog]
        session = await client.open("lstm")
        x = rows_of(networks["lstm"], 20)
        y = np.stack([(await session.step(row)) for row in x])
    told = [record for record in caplog.records if record.message == DIFFERS]
    assert [record.model for record in told] == models
    assert {record.weights for record in told} == {weights}
    assert all(0 < float(record.mean) < float(record.largest) < 0.5 for record in told)
    off = np.abs(y - networks["lstm"].offline(x)).max()
    assert 1e-5 < off < 0.1


async def test_float32_says_nothing(config: ServerConfig, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "stepstate.server")
    async with running_server(config):
        assert DIFFERS not in caplog.messages

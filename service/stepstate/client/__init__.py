"""Clients of a Stepstate server, asyncio and synchronous. Needs grpcio, protobuf and numpy.

>>> from stepstate.client import Client
>>> client = Client("127.0.0.1:50051")
>>> client.disconnect()
"""

from stepstate.client._protocol.packed import PackedResult
from stepstate.client.aio.client import AsyncClient
from stepstate.client.aio.pack import AsyncPack
from stepstate.client.aio.session import AsyncSession
from stepstate.client.forecast import Forecast, OutputForecast
from stepstate.client.outputs import Outputs
from stepstate.client.security import Tls, Token
from stepstate.client.sync.client import Client
from stepstate.client.sync.pack import Pack
from stepstate.client.sync.session import Session
from stepstate.client.times import TimedRows
from stepstate.client.types import (
    Accuracy,
    Drift,
    Durability,
    Inspection,
    LimitUsage,
    MissingPolicy,
    ModelInfo,
    Output,
    Result,
    SessionInfo,
    TenantUsage,
)

__all__ = [
    "Accuracy",
    "AsyncClient",
    "AsyncPack",
    "AsyncSession",
    "Client",
    "Drift",
    "Durability",
    "Forecast",
    "Inspection",
    "LimitUsage",
    "MissingPolicy",
    "ModelInfo",
    "Output",
    "OutputForecast",
    "Outputs",
    "Pack",
    "PackedResult",
    "Result",
    "Session",
    "SessionInfo",
    "TenantUsage",
    "TimedRows",
    "Tls",
    "Token",
]

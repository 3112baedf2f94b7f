"""Clients of a Stepstate server, asyncio and synchronous. Needs grpcio, protobuf and numpy.

>>> from stepstate.client import Client
>>> client = Client("127.0.0.1:50051")
>>> client.disconnect()
"""

from stepstate.client.aio import AsyncClient, AsyncSession
from stepstate.client.sync import Client, Session
from stepstate.client.values import Inspection, ModelInfo, Output, SessionInfo

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Client",
    "Inspection",
    "ModelInfo",
    "Output",
    "Session",
    "SessionInfo",
]

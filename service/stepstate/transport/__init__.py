"""The gRPC front doors."""

from stepstate.transport.guard import Guard
from stepstate.transport.native import NativeService
from stepstate.transport.outgoing import Outgoing
from stepstate.transport.reflection import add_reflection

__all__ = ["Guard", "NativeService", "Outgoing", "add_reflection"]

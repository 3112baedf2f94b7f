"""google.rpc's Status and details: the installed package's, or else the copy that lies here.

The client needs grpcio, protobuf and numpy only, so googleapis-common-protos
may be missing. Where it is there it must be used: protobuf refuses two copies
of one file in a process.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepstate.v1.vendored import error_details_pb2, status_pb2
else:
    try:
        from google.rpc import error_details_pb2, status_pb2
    except ImportError:
        from stepstate.v1.vendored import error_details_pb2, status_pb2

BadRequest = error_details_pb2.BadRequest
ErrorInfo = error_details_pb2.ErrorInfo
PreconditionFailure = error_details_pb2.PreconditionFailure
QuotaFailure = error_details_pb2.QuotaFailure
RetryInfo = error_details_pb2.RetryInfo
Status = status_pb2.Status

__all__ = [
    "BadRequest",
    "ErrorInfo",
    "PreconditionFailure",
    "QuotaFailure",
    "RetryInfo",
    "Status",
    "status_pb2",
]

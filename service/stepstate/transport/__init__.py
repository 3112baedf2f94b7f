"""The gRPC APIs of a server: decode, one call into `SessionService`, encode."""

from stepstate.transport.admission import CallAdmission
from stepstate.transport.authentication import Authenticator, CredentialAuthenticator
from stepstate.transport.bidi import Backend
from stepstate.transport.credentials import grpcio_credentials
from stepstate.transport.expected_rows import ExpectedRows
from stepstate.transport.health import HealthService
from stepstate.transport.interceptor import RpcInterceptor
from stepstate.transport.peers import PeerTable
from stepstate.transport.receiving import MAX_MESSAGE_BYTES, Receiver, ReceivingMemory
from stepstate.transport.registration import add_reflection, add_service, parse_stepstate
from stepstate.transport.servicer import StepstateServicer
from stepstate.transport.signatures import SnapshotKeys, read_keys

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Authenticator",
    "Backend",
    "CallAdmission",
    "CredentialAuthenticator",
    "ExpectedRows",
    "HealthService",
    "PeerTable",
    "Receiver",
    "ReceivingMemory",
    "RpcInterceptor",
    "SnapshotKeys",
    "StepstateServicer",
    "add_reflection",
    "add_service",
    "grpcio_credentials",
    "parse_stepstate",
    "read_keys",
]

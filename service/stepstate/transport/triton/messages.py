"""Triton's messages, from the package that ships them."""

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]

__all__ = ["SERVICE", "config_pb", "pb"]

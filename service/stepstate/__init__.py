"""Stepstate: a gRPC service that steps trained recurrent networks, session by session."""

__version__ = "0.1.0"

"""Compiled copies of google/rpc/*.proto, for where googleapis-common-protos is missing."""

"""The contract `stepstate.v1`: generated stubs, committed; `make protos` writes them."""

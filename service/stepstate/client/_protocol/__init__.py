"""What both clients share, without any input or output (sans-IO)."""

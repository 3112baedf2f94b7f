"""`stepstate bench`: what a step costs, what keeping sessions costs, how they come back."""


# ===== errors


class BenchError(Exception):
    """The benchmark can't be run, or what it measured would mean nothing."""

"""`stepstate bench`: what a step costs, what keeping sessions costs, how they come back."""

"""`stepstate bench`: closed-loop load on a server, beside a bare echo, in one run."""

"""Sessions in a file of SQLite: the embedded store.

store     the `SessionStore`: each call becomes a job
worker    the thread that takes together all jobs that came while it worked
writes    creates, acquires, saves and ends, many in a few statements
reads     the rest, each answered as one row
file      opens the file, and opens it again
schema    tables, version, identity
"""

from stepstate.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]

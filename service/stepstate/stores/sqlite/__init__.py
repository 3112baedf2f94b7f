"""Sessions in a file of SQLite: the embedded store.

store          the `SessionStore`: each call becomes a `StoreOp`
writer_thread  the thread that does all operations that arrived while it worked
file           opens the file, again if it broke, and keeps room for it on the disk
writes         creates, acquires, saves and ends, many in a few statements
reads          finds, lists and counts, each with one row as its result
schema         tables, version, clock and the settings of a connection
"""

from stepstate.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]

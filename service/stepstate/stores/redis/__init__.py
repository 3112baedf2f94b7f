"""Sessions in Redis: the store that servers of several machines share.

factory     opens the store of a URL, and warns of a Redis that may lose sessions
store       the `SessionStore`: each call becomes commands
commands    a script with its keys and arguments, and how its reply is read
scripts     the Lua that keeps Rule 1 of the stores
tenants     how many open sessions tenants have, and how a limit of them holds
keys        where a session is, and where it is in a listing
pipeline    sends commands together, in order, and again if a new connection may help
connection  one Redis, Sentinels or a cluster, and what the errors mean
"""

from stepstate.stores.redis.factory import open_redis
from stepstate.stores.redis.store import RedisStore

__all__ = ["RedisStore", "open_redis"]

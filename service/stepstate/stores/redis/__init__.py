"""Sessions in Redis: the store that servers of several machines share.

Its modules, from the top:

store     the `SessionStore`: each call becomes commands, each a script
opening   a store by its URL, and what is worth a warning about its Redis
lane      sends what came together in one pipeline, in order
link      one Redis, or a cluster, by way of redis-py
scripts   the Lua that keeps Rule 1 of the stores
keys      where a session is
"""

from stepstate.stores.redis.factory import open_redis
from stepstate.stores.redis.store import RedisStore

__all__ = ["RedisStore", "open_redis"]

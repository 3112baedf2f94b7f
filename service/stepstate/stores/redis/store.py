"""The `SessionStore` on Redis."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from stepstate.errors import InvalidField, StoreUnavailable
from stepstate.stores.base import (
    ENDING_SECONDS,
    Ending,
    EndReason,
    Entry,
    Save,
    Saved,
    SessionRecord,
)
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.lane import Lane
from stepstate.stores.redis.link import Argument, Command, Link, Reply
from stepstate.stores.redis.scripts import Script

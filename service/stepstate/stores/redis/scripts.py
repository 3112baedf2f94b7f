"""The Lua scripts: operations that have to be atomic in Redis.

The hash of a session: `r` record, `i` id, `m` model, `f` fingerprint, `o` owner, `p` previous
owner, `e` epoch, `t` rows, `x` expiry, `s` snapshot, `d` when to delete it, if it has expired, `q`
and `w`: number and store of the last operation. The hash of a tombstone: `e`, `r` reason, `t`, `i`
idle timeout, `x` when to delete it, `q`, `w`. Times are microseconds of the store's clock, epochs
are microseconds since 1970 or more: integers below 2^53, which Lua counts exactly.

Rule 1: a script that is sent twice takes effect once, which `q` and `w` ensure: so a command whose
        reply was lost with its connection can be sent again.
Rule 2: a save does not undo a later one of its store: one that timed out may still wait in Redis
        long after its server has gone on.
Rule 3: the keys that a script uses are its KEYS, in one slot, so that a cluster runs it.
Rule 4: a damaged hash, or a key of another type, fails no script: others depend on it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script."""

    text: str
    sha: str = field(init=False)
    """Its name in Redis, once Redis has it."""

    def __post_init__(self) -> None:
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


_COMMON = """
local function number(n) return string.format('%.0f', n) end
local function whole(text)
    return type(text) == 'string' and #text <= 18 and string.match(text, '^%d+$') ~= nil
end
local function fields(key, ...)
    local found = redis.pcall('HMGET', key, ...)
    if not found.err then return found end
    if string.find(found.err, 'WRONGTYPE', 1, true) then return {} end
    error(found.err)
end
local function texts(key, ...)
    local found = fields(key, ...)
    for i = 1, select('#', ...) do found[i] = found[i] or '' end
    return found
end
local function entry(key) return texts(key, 'r', 't', 'x', 'e', 'o', 'd', 'm') end
local function ending(key) return texts(key, 'r', 't', 'i', 'x') end
local function raised(epoch, unix_time)
    return number(math.max((whole(epoch) and tonumber(epoch) or 0) + 1, tonumber(unix_time)))
end
local function member_of(name) return (name[1] or '') .. ' ' .. (name[2] or '') end
local function tenant_of(name) return string.match(name[1] or '', '^([^/]*)/') end
local function add(counts, field, sessions)
    if redis.pcall('HINCRBY', counts, field, sessions) == 0 then
        redis.call('HDEL', counts, field)
    end
end
local function count(name, counts, sessions)
    local tenant, model = tenant_of(name), name[2] or ''
    if tenant then
        add(counts, tenant, sessions)
        model = tenant .. '/' .. model
    end
    add(counts, model, sessions)
end
local function list(name, listing, mark)
    if tenant_of(name) then redis.call('ZADD', listing, mark, member_of(name)) end
end
local function arrive(name, due, counts, listing, expires)
    list(name, listing, 0)
    if redis.call('ZADD', due, expires, member_of(name)) == 1 then count(name, counts, 1) end
end
local function leave(name, due, counts, expired, listing)
    local member = member_of(name)
    redis.call('ZREM', listing, member)
    if redis.call('ZREM', due, member) == 1 then
        count(name, counts, -1)
    else
        redis.call('ZREM', expired, member)
    end
end
local function open_of(tenant, counts, known)
    if known ~= '' then return tonumber(known) end
    if tenant then return tonumber(fields(counts, tenant)[1]) or 0 end
    local open = 0
    for bucket = 0, 255 do
        for _, sessions in ipairs(redis.pcall('HVALS', 'stepstate:{' .. bucket .. '}:counts')) do
            open = open + (tonumber(sessions) or 0)
        end
    end
    return open
end
local function past(expires, delete, now) return delete or tonumber(expires) <= tonumber(now) end
"""


def _with_common(text: str) -> Script:
    return Script(_COMMON + text)


CREATE = _with_common(
    """
local key, gone, due, counts, expired, listing, endings = unpack(KEYS)
local id, model, fingerprint, record, owner, t, expires, snapshot = unpack(ARGV)
local now, unix_time, replacing, q, w, most, known = unpack(ARGV, 9)
local old = fields(key, 'e', 'x', 'd', 'q', 'w', 'i', 'm')
local there = redis.call('EXISTS', key) == 1
if there then
    if old[4] == q and old[5] == w then return {1, old[1]} end
    if not (whole(old[1]) and whole(old[2])) then return {0, entry(key)} end
    if old[1] ~= replacing or not past(old[2], old[3], now) then return {0, entry(key)} end
end
if most ~= '' and (not there or old[3]) then
    local open = open_of(tenant_of({id}), counts, known)
    if open >= tonumber(most) then return {2, open} end
end
local epoch = raised(old[1] or fields(gone, 'e')[1], unix_time)
if there then
    redis.call('DEL', key)
    leave({old[6], old[7]}, due, counts, expired, listing)
end
redis.call('HSET', key, 'i', id, 'm', model, 'f', fingerprint, 'r', record, 'o', owner, 'p', '',
    'e', epoch, 't', t, 'x', expires, 's', snapshot, 'q', q, 'w', w)
arrive({id, model}, due, counts, listing, expires)
redis.call('DEL', gone)
redis.call('ZREM', endings, id)
return {1, epoch}
"""
)
"""{1, epoch}, {0, entry} of the session that has its key, or {2, open}: its tenant has no room."""

ACQUIRE = _with_common(
    """
local key, gone = unpack(KEYS)
local owner, now, unix_time, q, w = unpack(ARGV)
local old = fields(key, 'e', 'x', 'q', 'w', 'f', 'o', 'p', 'd', 't', 'r')
if redis.call('EXISTS', key) == 0 then return {0, ending(gone)} end
if not (whole(old[1]) and whole(old[2]) and whole(old[9]) and old[10]) then
    return {1, entry(key)}
end
local mine = old[3] == q and old[4] == w
local wanted = false
for i = 6, #ARGV do wanted = wanted or ARGV[i] == old[5] end
if not mine then
    if not wanted or past(old[2], old[8], now) then return {1, entry(key)} end
    local epoch = raised(old[1], unix_time)
    old[7] = old[6] or ''
    redis.call('HSET', key, 'e', epoch, 'o', owner, 'p', old[7], 'q', q, 'w', w)
    redis.call('PERSIST', key)
end
local taken = entry(key)
taken[5] = old[7] or ''
return {2, taken, redis.call('HGET', key, 's') or ''}
"""
)
"""{0, tombstone}, {1, entry} of one that was not taken, or {2, entry, snapshot}. Without
fingerprints it takes nothing: `find`."""

SAVE = _with_common(
    """
local verdicts = {}
local numbers = '^(%d+) (%d+) (%d+) (%d+) (%d) (.*)$'
for i = 1, #KEYS / 3 do
    local key, gone, due = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
    local epoch, q, t, expires, has_snapshot, owner = string.match(ARGV[2 * i - 1], numbers)
    local old = fields(key, 'e', 'q', 'i', 'm')
    if redis.call('EXISTS', key) == 0 then
        verdicts[i] = redis.call('EXISTS', gone) == 1 and 'fenced' or 'missing'
    elseif old[1] ~= epoch then
        verdicts[i] = 'fenced'
    else
        verdicts[i] = 'done'
        if tonumber(q) >= (tonumber(old[2]) or 0) then
            if has_snapshot == '1' then
                redis.call('HSET', key, 's', ARGV[2 * i], 'q', q, 't', t, 'x', expires,
                    'o', owner)
            else
                redis.call('HSET', key, 'q', q, 't', t, 'x', expires, 'o', owner)
            end
            if old[3] and old[4] then
                redis.call('ZADD', due, expires, old[3] .. ' ' .. old[4])
            end
        end
    end
end
return verdicts
"""
)
"""The result of each save: three keys, "epoch q t expiry has_snapshot owner", and the snapshot.
Few arguments, because redis-py spends most of its time on each."""

EXPIRE = _with_common(
    """
local delete, w, verdicts = ARGV[1], ARGV[2], {}
for i = 1, #KEYS / 6 do
    local key, gone, due, counts, expired, listing = unpack(KEYS, 6 * i - 5, 6 * i)
    local numbers = '^(%d+) (%d+) (%d+) (%d) (.*)$'
    local epoch, q, t, has_snapshot, owner = string.match(ARGV[2 * i + 1], numbers)
    local old = fields(key, 'e', 'q', 'w', 'd', 'i', 'm')
    if redis.call('EXISTS', key) == 0 then
        verdicts[i] = redis.call('EXISTS', gone) == 1 and 'fenced' or 'missing'
    elseif old[2] == q and old[3] == w and old[4] then
        verdicts[i] = 'done'
    elseif old[1] ~= epoch then
        verdicts[i] = 'fenced'
    else
        verdicts[i] = 'done'
        redis.call('HSET', key, 'e', raised(epoch, 0), 'o', owner, 't', t, 'd', delete,
            'q', q, 'w', w)
        if has_snapshot == '1' then redis.call('HSET', key, 's', ARGV[2 * i + 2]) end
        redis.call('PERSIST', key)
        leave({old[5], old[6]}, due, counts, expired, listing)
        redis.call('ZADD', expired, delete, member_of({old[5], old[6]}))
        list({old[5], old[6]}, listing, 1)
    end
end
return verdicts
"""
)
"""The result of each save: six keys, "epoch q t has_snapshot owner", and the snapshot."""

RESTORE = _with_common(
    """
local key, due, counts, expired, listing = unpack(KEYS)
local epoch, expires, q, w, most, known = unpack(ARGV)
local old = fields(key, 'e', 'd', 'q', 'w', 'i', 'm')
if old[3] == q and old[4] == w then return {1} end
if old[1] ~= epoch or not old[2] then return {0} end
if most ~= '' then
    local open = open_of(tenant_of({old[5]}), counts, known)
    if open >= tonumber(most) then return {2, open} end
end
redis.call('HDEL', key, 'd')
redis.call('HSET', key, 'e', raised(epoch, 0), 'x', expires, 'q', q, 'w', w)
redis.call('ZREM', expired, member_of({old[5], old[6]}))
arrive({old[5], old[6]}, due, counts, listing, expires)
return {1}
"""
)
"""{1} if it was expired and is open now, {0} if not, or {2, open} if its tenant has no room."""

END = _with_common(
    """
local key, gone, due, counts, expired, listing, endings = unpack(KEYS)
local epoch, reason, t, idle, forget, q, w = unpack(ARGV)
if fields(key, 'e')[1] ~= epoch then
    local done = fields(gone, 'q', 'w')
    return (done[1] == q and done[2] == w) and 1 or 0
end
local name = fields(key, 'i', 'm')
redis.call('DEL', key, gone)
leave(name, due, counts, expired, listing)
redis.call('HSET', gone, 'e', epoch, 'r', reason, 't', t, 'i', idle, 'x', forget, 'q', q, 'w', w)
if name[1] then redis.call('ZADD', endings, forget, name[1]) end
return 1
"""
)
"""1 if it was ended."""

DISCARD = _with_common(
    """
local key, gone, due, counts, expired, listing, endings = unpack(KEYS)
local id, reason, t, idle, forget, q, w = unpack(ARGV)
if redis.call('EXISTS', key) == 0 then
    local done = fields(gone, 'q', 'w')
    return (done[1] == q and done[2] == w) and 1 or 0
end
local found = entry(key)
for i = 1, #found do if found[i] ~= ARGV[7 + i] then return 0 end end
leave(fields(key, 'i', 'm'), due, counts, expired, listing)
redis.call('DEL', key, gone)
local epoch = whole(found[4]) and found[4] or '0'
redis.call('HSET', gone, 'e', epoch, 'r', reason, 't', t, 'i', idle, 'x', forget, 'q', q, 'w', w)
redis.call('ZADD', endings, forget, id)
return 1
"""
)
"""1 if it was ended; only if its entry is still the one in the last arguments."""

ENTRIES = _with_common(
    """
local entries = {}
for i, key in ipairs(KEYS) do
    entries[i] = redis.call('EXISTS', key) == 1 and entry(key) or {}
end
return entries
"""
)
"""The entry of each key; an empty one: there is no session."""

MEMBERS = Script(
    """
local members, most, each = {}, tonumber(ARGV[2]), tonumber(ARGV[3])
for _, key in ipairs(KEYS) do
    if #members >= most then break end
    local limit = math.min(most - #members, each)
    local found = redis.call('ZRANGEBYSCORE', key, '-inf', ARGV[1], 'LIMIT', 0, limit)
    for _, member in ipairs(found) do members[#members + 1] = member end
end
return members
"""
)
"""Members of some sets up to a score; limited in all, and for each set."""

LATEST = Script(
    """
local members = {}
for _, key in ipairs(KEYS) do
    for _, member in ipairs(redis.call('ZREVRANGE', key, 0, 0)) do
        members[#members + 1] = member
    end
end
return members
"""
)
"""The member with the highest score of each set."""

SIZES = Script(
    """
local sizes = {}
for i, key in ipairs(KEYS) do sizes[i] = redis.call('ZCARD', key) end
return sizes
"""
)

PERSIST = Script(
    """
for _, key in ipairs(KEYS) do redis.call('PERSIST', key) end
return {}
"""
)
"""Removes the time to live that earlier versions set."""

FORGET = _with_common(
    """
local gone, endings = unpack(KEYS)
local id, now = unpack(ARGV)
local forget = fields(gone, 'x')[1]
if whole(forget) and tonumber(forget) > tonumber(now) then
    redis.call('ZADD', endings, 'XX', forget, id)
    return 0
end
redis.call('DEL', gone)
return redis.call('ZREM', endings, id)
"""
)
"""Deletes a tombstone that is too old."""

CLOCK = _with_common(
    """
local clock = redis.pcall('GET', KEYS[1])
local now, since, begin = unpack(ARGV)
if whole(clock) and tonumber(clock) < 2^53 then
    now = string.format('%.0f', math.max(clock, math.min(now, clock + since)))
elseif begin == '' then
    return false
else
    now = begin
end
redis.call('SET', KEYS[1], now)
return now
"""
)
"""Advances the clock to `now`, by at most `since`; one that is missing or damaged starts at
`begin`, or not at all if that is empty."""

COUNTS = Script(
    """
local counts = {}
for i, key in ipairs(KEYS) do
    for _, value in ipairs(redis.call('HGETALL', key)) do counts[#counts + 1] = value end
end
return counts
"""
)

TIDY = _with_common(
    """
local key, due, counts, expired, listing = unpack(KEYS)
local member, model = unpack(ARGV)
if redis.call('EXISTS', key) == 1 then
    local other = member_of(fields(key, 'i', 'm'))
    if other == member then return 1 end
    if not (redis.call('ZSCORE', due, other) or redis.call('ZSCORE', expired, other)) then
        return 0
    end
end
leave({string.sub(member, 1, -2 - #model), model}, due, counts, expired, listing)
return 1
"""
)
"""Removes a member whose session is gone (those of earlier versions had a time to live); another
session of its id may be there. 0: the session is there, and its own id or model is damaged."""

TURN = Script(
    """
local queue, place, oldest = KEYS[1], ARGV[1], tonumber(ARGV[2])
for _, other in ipairs(redis.call('ZRANGE', queue, 0, -1)) do
    local taken = tonumber(string.match(other, '^%d+')) or 0
    if taken < oldest then redis.call('ZREM', queue, other) end
end
local last = redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')[2] or '0'
redis.call('ZADD', queue, 'NX', last + 1, place)
return redis.call('ZRANK', queue, place)
"""
)
"""How many are before a place in a queue, where a new one is the last. A place begins with the time
at which it was taken; those that are older than `oldest` are dropped."""

LEAVE = Script("return redis.call('ZREM', KEYS[1], ARGV[1])")

POSTPONE = Script(
    """
for _, key in ipairs(KEYS) do redis.call('ZADD', key, 'XX', ARGV[1], ARGV[2]) end
return {}
"""
)
"""Gives a member a later score in the sets that have it."""

PROBE = Script("return redis.call('SET', KEYS[1], ARGV[1])")
"""Fails unless the node can be written."""

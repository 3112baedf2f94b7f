"""The scripts: what has to be one step in Redis.

A session's hash: `r` record, `i` id, `m` model, `f` fingerprint, `o` owner, `p` previous owner,
`e` epoch, `t` rows, `x` expiry, `s` snapshot, `q` and `w`: number and store of the last
operation. An ending's: `e`, `r` reason, `t`, `i` idle timeout, `x` when to forget it, `q`, `w`.
Times are microseconds since 1970: whole numbers below 2^53, which is what Lua can count to.

Rule 1: a script sent twice does what it does once, because `q` and `w` tell it: so a command
        whose answer was lost with its connection can be sent again.
Rule 2: a save does not undo a later one of its store: one that timed out may still wait in
        Redis when its server has long gone on.
Rule 3: keys that a script touches are its KEYS, in one slot, so that a cluster runs it.
Rule 4: a damaged hash, or what is no hash, fails no script: it may be one of many.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script."""

    text: str
    sha: str = field(init=False)
    """By which Redis knows it once it has seen it."""

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
local function entry(key)
    local found = fields(key, 'r', 't', 'x', 'e', 'o', 'm')
    for i = 1, 6 do found[i] = found[i] or '' end
    return found
end
local function ending(key)
    local found = fields(key, 'r', 't', 'i', 'x')
    for i = 1, 4 do found[i] = found[i] or '' end
    return found
end
local function raised(epoch, now)
    return number(math.max((whole(epoch) and tonumber(epoch) or 0) + 1, tonumber(now)))
end
local function leave(key, due, counts)
    local name = fields(key, 'i', 'm')
    redis.call('DEL', key)
    if redis.call('ZREM', due, (name[1] or '') .. ' ' .. (name[2] or '')) == 1 then
        redis.pcall('HINCRBY', counts, name[2], -1)
    end
end
local function keep(key, expires, grace)
    redis.call('PEXPIREAT', key, number(math.floor(tonumber(expires) / 1000) + tonumber(grace)))
end
"""

CREATE = Script(
    _COMMON
    + """
local key, gone, due, counts = unpack(KEYS)
local id, model, fingerprint, record, owner, t, expires, snapshot, now, grace, q, w = unpack(ARGV)
local old = fields(key, 'e', 'x', 'q', 'w')
local there = redis.call('EXISTS', key) == 1
if there then
    if old[3] == q and old[4] == w then return {1, old[1]} end
    if not (whole(old[1]) and whole(old[2])) then return {0, entry(key)} end
    if tonumber(old[2]) > tonumber(now) then return {0, entry(key)} end
end
local epoch = raised(old[1] or fields(gone, 'e')[1], now)
if there then leave(key, due, counts) end
redis.call('HSET', key, 'i', id, 'm', model, 'f', fingerprint, 'r', record, 'o', owner, 'p', '',
    'e', epoch, 't', t, 'x', expires, 's', snapshot, 'q', q, 'w', w)
keep(key, expires, grace)
if redis.call('ZADD', due, expires, id .. ' ' .. model) == 1 then
    redis.pcall('HINCRBY', counts, model, 1)
end
redis.call('DEL', gone)
return {1, epoch}
"""
)
""" {1, epoch}, or {0, entry} of the one that is open. """

ACQUIRE = Script(
    _COMMON
    + """
local key, gone = unpack(KEYS)
local owner, now, q, w = unpack(ARGV)
local old = fields(key, 'e', 'x', 'q', 'w', 'f', 'o', 'p', 't', 'r')
if redis.call('EXISTS', key) == 0 then return {0, ending(gone)} end
for i = 1, 2 do if not whole(old[i]) then return {1, entry(key)} end end
if not (whole(old[8]) and old[9]) then return {1, entry(key)} end
local mine = old[3] == q and old[4] == w
local wanted = false
for i = 5, #ARGV do wanted = wanted or ARGV[i] == old[5] end
if not mine then
    if not wanted or tonumber(old[2]) <= tonumber(now) then return {1, entry(key)} end
    local epoch = raised(old[1], now)
    old[7] = old[6] or ''
    redis.call('HSET', key, 'e', epoch, 'o', owner, 'p', old[7], 'q', q, 'w', w)
end
local taken = entry(key)
taken[5] = old[7] or ''
return {2, taken, redis.call('HGET', key, 's') or ''}
"""
)
""" {0, ending}, {1, entry} of one that was not taken, or {2, entry, snapshot}. With no
fingerprints it takes nothing: `find`. """

SAVE = Script(
    _COMMON
    + """
local grace, verdicts = ARGV[1], {}
local numbers = '^(%d+) (%d+) (%d+) (%d+) (%d) (.*)$'
for i = 1, #KEYS / 3 do
    local key, gone, due = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
    local epoch, q, t, expires, has_snapshot, owner = string.match(ARGV[2 * i], numbers)
    local old = fields(key, 'e', 'q', 'i', 'm')
    if redis.call('EXISTS', key) == 0 then
        verdicts[i] = redis.call('EXISTS', gone) == 1 and 'fenced' or 'missing'
    elseif old[1] ~= epoch then
        verdicts[i] = 'fenced'
    else
        verdicts[i] = 'done'
        if tonumber(q) >= (tonumber(old[2]) or 0) then
            if has_snapshot == '1' then
                redis.call('HSET', key, 's', ARGV[2 * i + 1], 'q', q, 't', t, 'x', expires,
                    'o', owner)
            else
                redis.call('HSET', key, 'q', q, 't', t, 'x', expires, 'o', owner)
            end
            keep(key, expires, grace)
            if old[3] and old[4] then
                redis.call('ZADD', due, expires, old[3] .. ' ' .. old[4])
            end
        end
    end
end
return verdicts
"""
)
""" The verdict of each: three keys, "epoch q t expiry has_snapshot owner", and the snapshot.
Few arguments, because redis-py takes most of its time for each. """

END = Script(
    _COMMON
    + """
local key, gone, due, counts = unpack(KEYS)
local epoch, reason, t, idle, forget, keep_ms, q, w = unpack(ARGV)
if fields(key, 'e')[1] ~= epoch then
    local done = fields(gone, 'q', 'w')
    return (done[1] == q and done[2] == w) and 1 or 0
end
leave(key, due, counts)
redis.call('DEL', gone)
redis.call('HSET', gone, 'e', epoch, 'r', reason, 't', t, 'i', idle, 'x', forget, 'q', q, 'w', w)
redis.call('PEXPIRE', gone, keep_ms)
return 1
"""
)
""" 1 if it was ended. """

DISCARD = Script(
    _COMMON
    + """
local key, gone, due, counts = unpack(KEYS)
local reason, t, idle, forget, keep_ms, q, w = unpack(ARGV)
if redis.call('EXISTS', key) == 0 then
    local done = fields(gone, 'q', 'w')
    return (done[1] == q and done[2] == w) and 1 or 0
end
local found = entry(key)
for i = 1, #found do if found[i] ~= ARGV[7 + i] then return 0 end end
leave(key, due, counts)
local epoch = whole(found[4]) and found[4] or '0'
redis.call('DEL', gone)
redis.call('HSET', gone, 'e', epoch, 'r', reason, 't', t, 'i', idle, 'x', forget, 'q', q, 'w', w)
redis.call('PEXPIRE', gone, keep_ms)
return 1
"""
)
""" 1 if it was ended: a session whose entry is still the one of the last arguments. """

ENTRIES = Script(
    _COMMON
    + """
local entries = {}
for i, key in ipairs(KEYS) do
    entries[i] = redis.call('EXISTS', key) == 1 and entry(key) or {}
end
return entries
"""
)
""" The entry of each key; an empty one: there is none. """

MEMBERS = Script(
    """
local members, most = {}, tonumber(ARGV[2])
for _, key in ipairs(KEYS) do
    if #members >= most then break end
    local limit = most - #members
    local found = redis.call('ZRANGEBYSCORE', key, '-inf', ARGV[1], 'LIMIT', 0, limit)
    for _, member in ipairs(found) do members[#members + 1] = member end
end
return members
"""
)
""" Members of some buckets up to a score, at most so many. """

COUNTS = Script(
    """
local counts = {}
for i, key in ipairs(KEYS) do
    for _, value in ipairs(redis.call('HGETALL', key)) do counts[#counts + 1] = value end
end
return counts
"""
)

TIDY = Script(
    _COMMON
    + """
local key, due, counts = unpack(KEYS)
local member, model = unpack(ARGV)
local name = fields(key, 'i', 'm')
if redis.call('EXISTS', key) == 1 then
    local other = (name[1] or '') .. ' ' .. (name[2] or '')
    if other ~= member and not redis.call('ZSCORE', due, other) then return 0 end
    if other == member then return 1 end
end
if redis.call('ZREM', due, member) == 1 then redis.pcall('HINCRBY', counts, model, -1) end
return 1
"""
)
""" Forgets a member whose session went by itself, long after its expiry; another one of its id
may be there. 0: it is there, and its own name is damaged. """

POSTPONE = Script("""return redis.call('ZADD', KEYS[1], 'XX', ARGV[1], ARGV[2])""")
""" Gives a member a later score. """

PROBE = Script("return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])")
""" Whether a node can be written. """

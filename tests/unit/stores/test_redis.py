"""Where the store on Redis keeps what; what it promises is in tests/contract."""

from __future__ import annotations

import pytest
from redis._parsers import BaseParser
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    MaxConnectionsError,
    NoScriptError,
    ResponseError,
)
from redis.exceptions import ConnectionError as Disconnected

from stepstate.errors import STORE_CAUSES, InvalidField
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.commands import Command
from stepstate.stores.redis.connection import cause_of, may_pass
from stepstate.stores.redis.keys import key_of, model_of, place_after, place_of, token_of

IDS = [f"meter-{i}" for i in range(5000)]


def test_the_keys_of_a_session_are_in_one_slot_of_a_cluster():
    for key in [*IDS[:50], "{a}b", "a:{}:b", "acme/a", "acme/{a}b", "a}c{m:e/x"]:
        assert len({key_slot(name.encode()) for name in keys.of(key, cluster=True)}) == 1


def test_sessions_of_the_default_tenant_are_where_versions_without_tenants_look_for_them():
    for cluster in (False, True):
        found = keys.of("meter-7", cluster=cluster)._asdict()
        del found["listing"]  # of other tenants only
        assert found == {
            "session": "stepstate:{82}:session:meter-7",
            "tombstone": "stepstate:{82}:ending:meter-7",
            "due": "stepstate:{82}:due",
            "counts": "stepstate:{82}:counts",
            "expired": "stepstate:{82}:expired",
            "tombstones": "stepstate:{82}:endings",
        }


@pytest.mark.parametrize("tenant", ["acme", "session", "due", "tenants", "a:session:b"])
def test_nothing_of_another_tenant_is_where_those_versions_look(tenant):
    theirs = {
        name
        for session_id in [*IDS[:50], f"{tenant}:x", tenant]
        for name in keys.of(session_id, cluster=False)
    }
    theirs |= {key(number) for key in (keys.due, keys.expired) for number in keys.ALL_BUCKETS}
    theirs |= {key(number) for key in (keys.counts, keys.tombstones) for number in keys.ALL_BUCKETS}
    for cluster in (False, True):
        for session_id in IDS[:50]:
            assert not theirs & {*keys.of(f"{tenant}/{session_id}", cluster=cluster)}


def test_sessions_are_spread_over_all_buckets():
    filled = {keys.bucket(session_id) for session_id in IDS}
    assert filled == set(range(keys.BUCKETS))


def test_a_token_is_the_place_that_it_was_made_of():
    for session_id in [*IDS[:50], "acme/a"]:
        place = place_of(f"{session_id} lstm/1")
        assert place_after(token_of(place)) == place
    assert place_after("") == (0, "")


@pytest.mark.parametrize("token", ["x", "1", "1:", ":a", "999:a", "0:meter-7", "1:meter-7\x00"])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(InvalidField) as refused:
        place_after(token)
    assert refused.value.field == "page_token"


def test_a_member_has_id_and_model():
    assert (key_of("a:b lstm/1"), model_of("a:b lstm/1")) == ("a:b", "lstm/1")


def test_a_command_is_sent_by_name_or_whole():
    command = Command(scripts.COUNTS, ["k"], [1, b"x"])
    assert command.words(whole=False) == ("EVALSHA", scripts.COUNTS.sha, 1, "k", 1, b"x")
    assert command.words(whole=True) == ("EVAL", scripts.COUNTS.text, 1, "k", 1, b"x")


SCRIPT = "script: 2f5c, on @user_script:12."
ERRORS = {
    "READONLY You can't write against a read only replica.": "readonly",
    f"READONLY You can't write against a read only replica. {SCRIPT}": "readonly",
    "ERR Error running script (call to f_2f5c): @user_script:12: @user_script: 12: "
    "-READONLY You can't write against a read only replica. ": "readonly",  # Redis 6
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": (
        "masterdown"
    ),
    "LOADING Redis is loading the dataset in memory": "loading",
    "NOREPLICAS Not enough good replicas to write.": "noreplicas",
    f"NOREPLICAS Not enough good replicas to write. {SCRIPT}": "noreplicas",
    "OOM command not allowed when used memory > 'maxmemory'.": "oom",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to": "misconf",
    "CLUSTERDOWN Hash slot not served": "cluster",
    "MOVED 3999 127.0.0.1:6381": "cluster",
    "ASK 3999 127.0.0.1:6381": "cluster",
    "TRYAGAIN Multiple keys request during rehashing of slot": "cluster",
}


@pytest.mark.parametrize(("text", "cause"), ERRORS.items(), ids=[*ERRORS.values()])
def test_a_server_that_cant_serve_now_is_recognized_by_its_error(text, cause):
    error = BaseParser.parse_error(text)
    assert cause_of(error) == cause
    assert cause in STORE_CAUSES
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        ResponseError("ERR a session called -OOM"),
        AuthenticationError("invalid password"),
        MaxConnectionsError("too many"),
        NoScriptError("No matching script"),
    ],
)
def test_an_error_that_another_connection_would_get_too_is_not_retried(error):
    assert cause_of(error) == "other"
    assert not may_pass(error)


def test_a_timeout_is_not_retried_and_a_broken_connection_is():
    assert (cause_of(TimeoutError()), may_pass(TimeoutError())) == ("timeout", False)
    for error in (Disconnected("gone"), ConnectionRefusedError()):
        assert (cause_of(error), may_pass(error)) == ("disconnected", True)
    assert not may_pass([b"a reply"])

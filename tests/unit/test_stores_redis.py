"""Where the store on Redis keeps what; what it promises is in tests/contract."""

from __future__ import annotations

import pytest
from redis.crc import key_slot

from stepstate.errors import InvalidField
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.link import Command
from stepstate.stores.redis.members import id_of, model_of, place_after, place_of, token_of

IDS = [f"meter-{i}" for i in range(5000)]


def test_the_keys_of_a_session_are_in_one_slot_of_a_cluster():
    for session_id in [*IDS[:50], "{a}b", "a:{}:b"]:
        number = keys.bucket(session_id)
        names = (keys.session(session_id), keys.ending(session_id), keys.due(number))
        assert len({key_slot(name.encode()) for name in (*names, keys.counts(number))}) == 1


def test_a_session_stays_in_its_bucket_whatever_version_looks_for_it():
    assert keys.session("meter-7") == "stepstate:{82}:session:meter-7"
    assert keys.due(82) == "stepstate:{82}:due"


def test_sessions_are_spread_over_all_buckets():
    filled = {keys.bucket(session_id) for session_id in IDS}
    assert filled == set(range(keys.BUCKETS))


def test_a_token_is_the_place_that_it_was_made_of():
    for session_id in IDS[:50]:
        place = place_of(f"{session_id} lstm/1")
        assert place_after(token_of(place)) == place
    assert place_after("") == (0, "")


@pytest.mark.parametrize("token", ["x", "1", "1:", ":a", "999:a", "0:meter-7", "1:meter-7\x00"])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(InvalidField) as refused:
        place_after(token)
    assert refused.value.field == "page_token"


def test_a_member_tells_id_and_model():
    assert (id_of("a:b lstm/1"), model_of("a:b lstm/1")) == ("a:b", "lstm/1")


def test_a_command_is_sent_by_name_or_whole():
    command = Command(scripts.COUNTS, ["k"], [1, b"x"])
    assert command.words(whole=False) == ("EVALSHA", scripts.COUNTS.sha, 1, "k", 1, b"x")
    assert command.words(whole=True) == ("EVAL", scripts.COUNTS.text, 1, "k", 1, b"x")

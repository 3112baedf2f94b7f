"""Keys of sessions: one for each tenant and id, and back."""

from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.identity import DEFAULT_TENANT, id_of, session_key, split_key

tenants = st.sampled_from(["default", "acme", "a", "acme.x"])


@given(tenants, st.text(max_size=8), tenants, st.text(max_size=8))
@example("default", "acme/meter", "acme", "meter")
def test_different_sessions_have_different_keys(a: str, x: str, b: str, y: str) -> None:
    assert (session_key(a, x) == session_key(b, y)) == ((a, x) == (b, y))


@given(tenants, st.text(max_size=8))
@example("default", "acme/meter")
def test_a_key_says_whose_it_is(tenant: str, session_id: str) -> None:
    key = session_key(tenant, session_id)
    assert (split_key(key), id_of(key)) == ((tenant, session_id), session_id)


def test_sessions_of_earlier_versions_are_the_default_tenants() -> None:
    assert session_key(DEFAULT_TENANT, "meter-1") == "meter-1"

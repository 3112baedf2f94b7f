"""How many examples Hypothesis tries: all of them, or with `--hypothesis-profile quick` a fifth.

Both profiles try the same examples everywhere, and have no deadline for one.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_THOROUGH = 40
"""Examples of a test that asks for no number."""
_QUICK = 8


def register_profiles() -> None:
    """`thorough` is loaded, unless pytest is told `--hypothesis-profile quick`."""
    for name, count in (("thorough", _THOROUGH), ("quick", _QUICK)):
        settings.register_profile(
            name,
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
    settings.load_profile("thorough")


def examples(count: int, **more: int) -> settings:
    """Settings for `count` examples in the thorough profile, and a fifth in the quick one."""
    return settings(max_examples=count * settings().max_examples // _THOROUGH, **more)

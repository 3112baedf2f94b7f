"""`help()` of both clients is whole: nobody has to look a method up at the other one."""

from __future__ import annotations

import inspect
import re

import pytest

from stepstate.client import AsyncClient, AsyncPack, AsyncSession, Client, Pack, Session
from stepstate.client._protocol.session import BaseSession

TWINS = [(AsyncClient, Client), (AsyncSession, Session), (AsyncPack, Pack)]
CLASSES = [cls for twins in TWINS for cls in twins]
ELSEWHERE = re.compile(r"\b[Ss]ee `|[Rr]aises as|\b[Aa]s (in )?`|\b[Aa]s the same")
"""What sends a reader to another method for what this one takes, gives or raises."""


def public(cls: type) -> dict[str, object]:
    """The public methods and properties that are in the packages of the two clients."""
    own = [
        base
        for base in cls.__mro__
        if re.search(r"\.client\.(aio|sync|_connection)", base.__module__)
    ]
    names = {name for base in own for name in vars(base) if not name.startswith("_")}
    return {name: inspect.getattr_static(cls, name) for name in names}


def text(member: object) -> str:
    """What `help()` shows of it."""
    if isinstance(member, type):
        return "\n\n".join(filter(None, [inspect.getdoc(member), inspect.getdoc(member.__init__)]))
    return inspect.getdoc(member) or ""


def section(found: str, name: str) -> str:
    """What is below a heading; nothing without it."""
    part = re.search(rf"^{name}:\n((?:(?: .*)?\n?)+)", found, re.MULTILINE)
    return part[1] if part else ""


METHODS = [
    pytest.param(cls, name, id=f"{cls.__name__}.{name}")
    for cls in CLASSES
    for name in [*sorted(public(cls)), *(["time"] if issubclass(cls, BaseSession) else [])]
]


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_a_public_method_says_what_it_does_takes_and_raises(cls: type, name: str):
    member = inspect.getattr_static(cls, name)
    found = text(member)
    assert found.splitlines()[0].endswith("."), "its first line is no sentence"
    assert not ELSEWHERE.search(found)
    function = member.fget if isinstance(member, property) else member
    arguments = section(found, "Args")
    for parameter in list(inspect.signature(function).parameters)[1:]:
        told = found if name == "time" else arguments
        assert re.search(rf"\b{parameter}\b", told), f"{parameter} is not described"


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins[1].__name__)
def test_both_clients_have_the_same_methods_with_the_same_arguments(twins: tuple[type, type]):
    theirs, ours = map(public, twins)
    assert set(theirs) == set(ours)
    for name, member in ours.items():
        if callable(member):
            extra = {"max_items"}  # one item is in flight at a time here
            wanted = set(inspect.signature(theirs[name]).parameters) - extra
            assert set(inspect.signature(member).parameters) == wanted


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins[1].__name__)
def test_both_clients_raise_the_same(twins: tuple[type, type]):
    theirs, ours = map(public, twins)
    for name in ours:
        if name == "stream":  # the one for many sessions differs, and says so
            continue
        raised = [set(re.findall(r"\b[A-Z]\w+(?=[,:])", section(text(one[name]), "Raises")))
                  for one in (theirs, ours)]  # fmt: skip
        assert raised[0] == raised[1], name
        if name not in {"disconnect", "end", "packed", "stub"}:
            assert raised[0], f"{name} says nothing of what it raises"


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_says_what_it_takes(cls: type):
    found = text(cls)
    assert not re.search(r"\b[Ss]ee `", found)
    if not issubclass(cls, BaseSession):  # a session is made by a client
        arguments = section(found, "Args")
        for parameter in list(inspect.signature(cls).parameters):
            assert re.search(rf"\b{parameter}\b", arguments), f"{parameter} is not described"

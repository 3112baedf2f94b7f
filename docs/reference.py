"""Pages made from the code and the contract: nothing in them is written by hand twice.

`pages()` gives each page's place in the site and its Markdown; docs/hooks.py adds them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import yaml
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)
from grpc_tools import protoc

from stepstate import client, config, errors
from stepstate.auth import CertificateRule
from stepstate.cli.main import main as stepstate_command
from stepstate.metrics import SERIES
from stepstate.tenants import RateLimits, TenantLimits
from stepstate.transport.status import code_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).parent.parent
CONTRACT = "stepstate/v1/stepstate.proto"
PACKAGE = ".stepstate.v1."
CONFIGURATION = """\
Every setting is an option of `stepstate serve`, an environment variable, and a key of the table
`[server]` in the [configuration file](operations.md#the-configuration-file), in this order: an
option wins over a variable, that over the file, and that over the default. The reason for each
default is beside it. `stepstate config show` prints the settings that a server would have, and the
origin of each. [Further tables](#tables-of-the-file) can be in the file only.

"""
FILE_ONLY = """\
All of them can be reloaded. Beside those below there is `[models."NAME"]`: its key `tenants` lists
the tenants that may use a model; without such a table all may.

"""
TABLES = (
    (
        "[limits]",
        TenantLimits,
        """What each tenant may use; a key that is left out is no limit. `[tenants.NAME]` has the
        same keys, where one tenant is different; `"unlimited"` takes a limit away.""",
    ),
    ("[limits.together]", RateLimits, "What all tenants together may use, on one server."),
    (
        "[[certificates]]",
        CertificateRule,
        "Whose the client certificates with certain names are. The first rule that fits counts.",
    ),
)
"""Of the configuration file, beside `[server]`."""
METRICS = """\
The series of `http://127.0.0.1:9464/metrics` (`--metrics-listen`), beside those of the process, of
Python and of its garbage collector. Labels are bounded: no series has the id of a session.

"""
ALERTS = """\
The rules for Prometheus in `deploy/alerts.yml`. They are for servers that are scraped as
`job="stepstate"`.

"""

ERROR = """\
::: stepstate.errors.{name}
    options:
        inherited_members: false

"""

_KINDS = {"int | None": "int", "float | None": "float", "frozenset[Scope]": "list of str"}

Comments = dict[tuple[int, ...], str]
"""The comments of the contract, by the path of what they describe in its descriptor."""

_REASON = re.compile(r"\b([A-Z]+(?:_[A-Z]+)+|DRAINING)\b")


def pages() -> dict[str, str]:
    """Every page by its place in the site."""
    return {
        **dict(_api()),
        "contract.md": contract(),
        "configuration.md": configuration(),
        "commands.md": commands(),
        "metrics.md": metrics(),
        "alerts.md": alerts(),
    }


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text of the code as Markdown: <name> is no HTML."""
    return text.replace("<", "&lt;")


# The Python API


def _api() -> Iterator[tuple[str, str]]:
    names = client.__all__
    aio = [name for name in names if name.startswith("Async")]
    sync = [name.removeprefix("Async") for name in aio]
    rest = [name for name in names if name not in {*aio, *sync}]
    intro = "The names of `stepstate.client`: "
    yield "api/client.md", _listed("Client", f"{intro}connect, open sessions, step them.", sync)
    yield "api/aio.md", _listed("Asyncio client", f"{intro}the same client for asyncio.", aio)
    yield "api/types.md", _listed("Types", f"{intro}what both clients take and give.", rest)
    yield "api/errors.md", _errors()
    yield (
        "api/models.md",
        "# Writing models\n\n::: stepstate.models.write_model\n",
    )


def _listed(title: str, intro: str, names: Iterable[str]) -> str:
    parts = [f"# {title}\n\n{intro}\n\n"]
    for name in names:
        parts.append(f"::: stepstate.client.{name}\n")
        hidden = _shared_by_both_clients(getattr(client, name))
        if hidden:
            parts.append(f"    options:\n        filters: ['!^_', '!^({'|'.join(hidden)})$']\n")
        parts.append("\n")
    return "".join(parts)


def _shared_by_both_clients(cls: object) -> list[str]:
    """What sessions of both clients are made of; only `time` of it is for users."""
    bases = [base for base in getattr(cls, "__mro__", ()) if base.__name__ == "BaseSession"]
    names = [name for base in bases for name in vars(base) if name != "time" and name[0] != "_"]
    return [name for name in names if name not in vars(cls)]


def _errors() -> str:
    tree = inspect.getdoc(errors) or ""
    head, _, after = tree.partition("\n\n")
    drawing, _, notes = after.partition("\n\n")
    return (
        f"# Errors\n\n{head}\n\n```text\n{inspect.cleandoc(drawing)}\n```\n\n{notes}\n\n"
        + "".join(ERROR.format(name=cls.__name__) for cls in _error_classes())
    )


def _error_classes() -> list[type[errors.StepstateError]]:
    values = vars(errors).values()
    return [v for v in values if isinstance(v, type) and issubclass(v, errors.StepstateError)]


# The contract


def contract() -> str:
    """The services, messages, enums and reasons of the contract, with its own comments."""
    file = _descriptor()
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    syntax = next(at for at in file.source_code_info.location if list(at.path) == [12])
    intro = [*syntax.leading_detached_comments, syntax.leading_comments]
    parts = ["# The contract\n\n", *(_comment(text) + "\n\n" for text in intro if text.strip())]
    parts += [_reasons()]
    for at, service in enumerate(file.service):
        parts += [f"## {service.name}\n\n{_comment(comments[6, at])}\n\n"]
        parts += [
            _method(method, comments[6, at, 2, place])
            for place, method in enumerate(service.method)
        ]
    parts += ["## Messages\n\n"]
    parts += [_message(at, message, comments) for at, message in enumerate(file.message_type)]
    parts += ["## Enums\n\n"]
    parts += [_enum(at, enum, comments) for at, enum in enumerate(file.enum_type)]
    return "".join(parts)


def _descriptor() -> FileDescriptorProto:
    """The contract as protoc reads it, with comments."""
    built_in = Path(protoc.__file__).parent / "_proto"
    with TemporaryDirectory() as folder:
        out = Path(folder, "contract")
        command = ["protoc", f"-I{ROOT / 'protos'}", f"-I{built_in}", "--include_source_info"]
        if protoc.main([*command, f"--descriptor_set_out={out}", CONTRACT]) != 0:
            raise SystemExit("protoc refused the contract")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _comment(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "buf:lint" not in line]
    return _plain("\n".join(lines).strip())


def _reasons() -> str:
    classes = {cls.reason: cls for cls in _error_classes()}
    rows = []
    for cls in (classes[reason] for reason in errors.REASONS):
        reason = f"[`{cls.reason}`](api/errors.md#{cls.__module__}.{cls.__name__})"
        names = ", ".join(f"`{field.name}`" for field in fields(cls))
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        rows.append((reason, code_of(cls.__new__(cls)).name, f"{summary}<br>{names}"))
    heads = ("Reason", "Status", "Meaning, and metadata")
    return "## Error reasons\n\n" + _table(heads, rows)


def _method(method: MethodDescriptorProto, comment: str) -> str:
    text, _, listed = _comment(comment).partition("\nErrors: ")
    asks = ("stream " if method.client_streaming else "") + _type_link(method.input_type)
    gives = ("stream " if method.server_streaming else "") + _type_link(method.output_type)
    reasons = "\n\nErrors: " + _REASON.sub(r"`\1`", listed) if listed else ""
    return f"### {method.name}\n\n{asks} → {gives}\n\n{text}{reasons}\n\n"


def _type_link(full_name: str) -> str:
    if full_name.startswith(PACKAGE):
        name = full_name.removeprefix(PACKAGE)
        return f"[{name}](#{name.lower()})"
    return f"`{full_name.removeprefix('.')}`"


def _type(field: FieldDescriptorProto) -> str:
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    text = _type_link(field.type_name) if field.type_name else f"`{name}`"
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return ("repeated " if repeated else "optional " if field.proto3_optional else "") + text


def _message(at: int, message: DescriptorProto, comments: Comments) -> str:
    rows = [
        (str(field.number), f"`{field.name}`", _type(field), _comment(comments[4, at, 2, place]))
        for place, field in enumerate(message.field)
    ]
    heads = ("#", "Field", "Type", "Meaning")
    return f"### {message.name}\n\n{_comment(comments[4, at])}\n\n" + _table(heads, rows)


def _enum(at: int, enum: EnumDescriptorProto, comments: Comments) -> str:
    rows = [
        (str(value.number), f"`{value.name}`", _comment(comments[5, at, 2, place]))
        for place, value in enumerate(enum.value)
    ]
    heads = ("#", "Value", "Meaning")
    return f"### {enum.name}\n\n{_comment(comments[5, at])}\n\n" + _table(heads, rows)


# Settings, metrics, alerts, commands


def configuration() -> str:
    """Every setting of a server: option, variable, default, and the reason beside it."""
    parts = ["# Configuration\n\n", CONFIGURATION]
    for field in fields(config.ServerConfig):
        option, variable = field.name.replace("_", "-"), field.name.upper()
        kind = "path" if isinstance(field.default, Path) else type(field.default).__name__
        kind += ", can be reloaded" if field.metadata["reloads"] else ""
        text, reason = _plain(field.metadata["help"]), _plain(field.metadata["reason"])
        default = f"`{field.default}`" if field.default != "" else "empty"
        is_option = field.name not in config.VARIABLES_ONLY
        heading = f"--{option}" if is_option else f"STEPSTATE_{variable}"
        also = f"`STEPSTATE_{variable}`, {kind}" if is_option else f"No option, {kind}"
        parts += [
            f"## `{heading}`\n\n{also}\n\n{text}\n\n",
            f"Default: {default}. {reason}\n\n",
        ]
    parts.append(f"## Tables of the file\n\n{FILE_ONLY}")
    for name, cls, text in TABLES:
        keys = [(f"`{key}`", f"`{kind}`", meaning) for key, kind, meaning in _documented(cls)]
        parts.append(
            f"### `{name}`\n\n{inspect.cleandoc(text)}\n\n"
            + _table(("Key", "Type", "Meaning"), keys)
        )
    return "".join(parts)


def _documented(cls: type[DataclassInstance]) -> Iterator[tuple[str, str, str]]:
    """The fields of a dataclass: name, type, and the text below it or in its docstring."""
    below: dict[str, str] = {}
    for base in cls.__mro__[:-1]:
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                below[ast.unparse(field.target)] = ast.literal_eval(text.value)
    listed = dict(
        re.findall(
            r"^ {4}(\w+): (.*?)(?=^ {4}\w|^$|\Z)",
            inspect.getdoc(cls) or "",
            re.MULTILINE | re.DOTALL,
        )
    )
    for one in fields(cls):
        yield (
            one.name,
            _KINDS.get(str(one.type), str(one.type)),
            _plain({**listed, **below}[one.name]),
        )


def metrics() -> str:
    """The table of series."""
    rows = []
    for series in SERIES:
        labels = ", ".join(f"`{label}`" for label in series.labels)
        rows.append((f"`{series.name}`<br>{labels}", series.type, _plain(series.help)))
    return f"# Metrics\n\n{METRICS}" + _table(("Series, and labels", "Type", "Meaning"), rows)


def commands() -> str:
    """What `--help` of each command prints."""
    parts = ["# Command line\n\nWhat `--help` of each command prints.\n\n"]
    root = click.Context(stepstate_command, info_name="stepstate", terminal_width=80)
    for context in _contexts(root):
        depth = "#" * min(context.command_path.count(" ") + 2, 4)
        parts.append(f"{depth} {context.command_path}\n\n```text\n{context.get_help()}\n```\n\n")
    return "".join(parts)


def _contexts(context: click.Context) -> Iterator[click.Context]:
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield from _contexts(
                    click.Context(command, parent=context, info_name=name, terminal_width=80)
                )


def alerts() -> str:
    """The alerts of deploy/alerts.yml: when each fires, and what to do."""
    groups = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"]
    parts = ["# Alerts\n\n", ALERTS]
    for rule in (rule for group in groups for rule in group["rules"]):
        wait = f", after {rule['for']}" if "for" in rule else ""
        parts.append(
            f"## {rule['alert']}\n\n**{rule['labels']['severity']}**{wait}. "
            f"{rule['annotations']['description']}\n\n```promql\n{rule['expr'].strip()}\n```\n\n"
        )
    return "".join(parts)

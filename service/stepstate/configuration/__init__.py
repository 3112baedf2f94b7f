"""The configuration of a server: from options, variables and a file to values.

Rule 1: an option wins over a variable, that over the file, and that over the default.
Rule 2: nothing is guessed. A name that is not known and a value of another type are errors.
Rule 3: no secret is on a command line, in the file, or in what is shown.
"""

from stepstate.configuration.effective import (
    Configuration,
    GivenValue,
    Load,
    SettingOrigin,
    as_toml,
    has_identities,
    resolve,
)
from stepstate.configuration.exposure import check_exposure
from stepstate.configuration.file import FileSettings, parse, read_file

__all__ = [
    "Configuration",
    "FileSettings",
    "GivenValue",
    "Load",
    "SettingOrigin",
    "as_toml",
    "check_exposure",
    "has_identities",
    "parse",
    "read_file",
    "resolve",
]

"""The command `stepstate`."""

import sys
from typing import NoReturn

try:
    from stepstate.cli.main import main
except ModuleNotFoundError as error:
    if error.name != "click":
        raise

    def main() -> NoReturn:  # type: ignore[misc]
        """Where only the client is installed."""
        sys.exit(
            "stepstate: the command line needs the extra `cli`, a server the extra `server`: where "
            "`pip install X` installed the client, `pip install 'X[cli]'` or 'X[server]' adds them"
        )


__all__ = ["main"]

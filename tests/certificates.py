"""Certificates for tests of TLS, made by `openssl`."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from itertools import count
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key, in PEM files."""

    file: Path
    key: Path


def install(certificate: Certificate, file: Path, key: Path) -> None:
    """Puts a certificate and its key where a server looks for them, each by a rename."""
    for source, target in ((certificate.file, file), (certificate.key, key)):
        new = target.with_suffix(".new")
        shutil.copy(source, new)
        new.chmod(0o600)
        new.rename(target)


class Authority:
    """Signs certificates for two days.

    Args:
        folder: for all files.
        openssl: the program.
    """

    def __init__(self, folder: Path, openssl: str = "openssl") -> None:
        self._folder = folder
        self._openssl = openssl
        self._numbers = count()
        self._own = self._make("authority")

    @property
    def file(self) -> Path:
        """Its own certificate."""
        return self._own.file

    def issue(self, name: str, alternative_names: str = "", *, age_days: int = 0) -> Certificate:
        """Makes a certificate with this common name.

        Args:
            name: the common name, and the name of its files.
            alternative_names: as openssl takes them, such as "DNS:localhost,IP:127.0.0.1".
            age_days: how long ago it was made; after two days it has expired.
        """
        options = ["-CA", str(self.file), "-CAkey", str(self._own.key)]
        options += ["-addext", "basicConstraints=CA:FALSE"]
        if alternative_names:
            options += ["-addext", f"subjectAltName={alternative_names}"]
        return self._make(name, *options, age_days=age_days)

    def _make(self, name: str, *options: str, age_days: int = 0) -> Certificate:
        files = f"{name}-{next(self._numbers)}"  # no test may replace those of another
        made = Certificate(self._folder / f"{files}.pem", self._folder / f"{files}.key")
        command = [self._openssl, "req", "-x509", "-days", "2", "-subj", f"/CN={name}", "-nodes"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-out", str(made.file), "-keyout", str(made.key), *options]
        if age_days:
            command = ["faketime", f"{age_days} days ago", *command]
        subprocess.run(command, check=True, capture_output=True)
        return made

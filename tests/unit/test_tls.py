"""The TLS files of a server: what is refused, and what happens when they change."""

from __future__ import annotations

import logging
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from stepstate import tls as module
from stepstate.errors import TlsInvalid
from stepstate.tls import ClientAuth, LoadedTls, ServerTls, TlsFiles, load_tls
from tests.certificates import Authority, Certificate, install


@pytest.fixture
def files(certificate: Certificate, tmp_path: Path) -> TlsFiles:
    """Copies that a test may change."""
    made = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key")
    put(certificate, made)
    return made


def put(certificate: Certificate, files: TlsFiles) -> None:
    install(certificate, files.certificate, files.key)


def encrypted(key: Path) -> None:
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:s3cret", "-in", key]
    key.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)


def text(path: Path) -> None:
    path.write_text("no PEM")


FAULTS = [
    ("certificate", Path.unlink, "--tls-cert.*No such file"),
    ("certificate", text, "--tls-cert.*no certificates in PEM"),
    ("key", Path.unlink, "--tls-key.*No such file"),
    ("key", text, "--tls-key.*no private key in PEM"),
    ("key", encrypted, "--tls-key.*encrypted.*openssl pkey"),
]


@pytest.mark.parametrize(("which", "spoil", "problem"), FAULTS)
def test_files_that_cannot_be_used_say_which_and_why(
    files: TlsFiles, which: str, spoil: Callable[[Path], None], problem: str
):
    secrets = files.key.read_text().splitlines()[1:-1]
    spoil(getattr(files, which))
    with pytest.raises(TlsInvalid, match=problem) as refused:
        load_tls(files)
    assert str(getattr(files, which)) in str(refused.value)
    assert not [line for line in secrets if line in str(refused.value)]


def test_a_key_of_another_certificate_is_refused(files: TlsFiles, authority: Authority):
    shutil.copy(authority.issue("another").key, files.key)
    with pytest.raises(TlsInvalid, match=r"not the key of the certificate in .*tls.crt"):
        load_tls(files)


@pytest.mark.parametrize(
    ("age_days", "problem"), [(4, "CN=old expired at .*Z: renew it"), (-2, "see the clock")]
)
def test_a_certificate_that_is_not_valid_now_is_refused(
    files: TlsFiles, authority: Authority, program, age_days: int, problem: str
):
    program("faketime")
    put(authority.issue("old", age_days=age_days), files)
    with pytest.raises(TlsInvalid, match=problem):
        load_tls(files)


def test_an_authority_of_clients_that_cannot_be_read_is_refused(files: TlsFiles, tmp_path: Path):
    authority = tmp_path / "ca.crt"
    asking = TlsFiles(files.certificate, files.key, authority, ClientAuth.REQUIRED)
    with pytest.raises(TlsInvalid, match=r"--tls-client-ca.*ca.crt: No such file"):
        load_tls(asking)
    authority.write_text("no PEM")
    with pytest.raises(TlsInvalid, match=r"--tls-client-ca.*no certificates in PEM"):
        load_tls(asking)


def test_authorities_of_clients_may_expire_one_by_one(
    files: TlsFiles, authority: Authority, program, tmp_path: Path
):
    program("faketime")
    old, both = authority.issue("old authority", age_days=4).file, tmp_path / "both.crt"
    with pytest.raises(TlsInvalid, match="all of its certificates have expired"):
        load_tls(TlsFiles(files.certificate, files.key, old, ClientAuth.REQUIRED))
    both.write_bytes(old.read_bytes() + authority.file.read_bytes())
    load_tls(TlsFiles(files.certificate, files.key, both, ClientAuth.REQUIRED))


def test_only_versions_and_ciphers_that_http2_allows_are_offered(files: TlsFiles):
    """RFC 9113, section 9.2: TLS 1.2 at least; ephemeral keys, and authenticated encryption."""
    loaded = load_tls(files)
    for context in (loaded.http2, loaded.http):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        for cipher in context.get_ciphers():
            assert cipher["aead"], cipher
            assert cipher["protocol"] == "TLSv1.3" or cipher["name"].startswith("ECDHE"), cipher


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_key_that_everybody_can_read_is_warned_of(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, mode: int
):
    files.key.chmod(mode)
    ServerTls(files)
    assert [record.file for record in caplog.records] == [str(files.key)] * (mode == 0o644)


# Files that change.


def served(tls: ServerTls, authority: Authority) -> str:
    """The common name of the certificate that a new connection gets."""
    trusting = ssl.create_default_context(cafile=authority.file)
    trusting.check_hostname = False
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(down, up)
    server = tls.current.http2.wrap_bio(up, down, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    subject = dict(part[0] for part in client.getpeercert()["subject"])
    return subject["commonName"]


def poll(tls: ServerTls) -> None:
    """As often as it takes to see a change, and that it is over."""
    for _ in range(3):
        tls.poll()


def test_new_files_are_served_and_their_expiry_shown(files: TlsFiles, authority: Authority):
    tls = ServerTls(files)
    assert served(tls, authority) == "server"
    before = tls.current.expires_at
    put(authority.issue("renewed"), files)
    poll(tls)
    assert served(tls, authority) == "renewed"
    assert tls.current.expires_at >= before
    assert not tls.reload_failed


@pytest.mark.parametrize("fault", FAULTS)
def test_new_files_that_cannot_be_used_change_nothing_but_the_log(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, certificate, authority, fault
):
    """Once, until they change again."""
    which, spoil, problem = fault
    tls = ServerTls(files)
    before = tls.current
    spoil(getattr(files, which))
    poll(tls)
    poll(tls)
    assert tls.current is before
    assert tls.reload_failed
    assert served(tls, authority) == "server"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert re.search(problem, record.problem)
    put(certificate, files)
    poll(tls)
    assert not tls.reload_failed


def test_files_that_are_written_one_by_one_are_not_read_in_between(
    files: TlsFiles, authority: Authority, caplog: pytest.LogCaptureFixture
):
    tls, new = ServerTls(files), authority.issue("renewed")
    shutil.copy(new.file, files.certificate)
    tls.poll()  # the key is still that of before
    shutil.copy(new.key, files.key)
    poll(tls)
    assert served(tls, authority) == "renewed"
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


def test_a_folder_that_a_link_leads_to_may_be_replaced(authority: Authority, tmp_path: Path):
    """As Kubernetes updates a mounted secret: tls.crt -> ..data/tls.crt, ..data -> a folder."""

    def folder(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        put(authority.issue(name), TlsFiles(made / "tls.crt", made / "tls.key"))
        return made

    data = tmp_path / "..data"
    data.symlink_to(folder("one"))
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(data / name)
    tls = ServerTls(TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key"))
    assert served(tls, authority) == "one"
    new = tmp_path / "..new"
    new.symlink_to(folder("two"))
    new.rename(data)
    poll(tls)
    assert served(tls, authority) == "two"


def test_of_two_readings_at_once_the_newer_one_counts(
    files: TlsFiles, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    """Whichever takes longer: an authority that is removed does not come back."""
    tls, slow, started = ServerTls(files), Event(), Event()

    def load_slowly(files: TlsFiles) -> LoadedTls:
        found = load_tls(files)
        started.set()
        slow.wait(20)
        return found

    monkeypatch.setattr(module, "load_tls", load_slowly)
    older = Thread(target=tls.reload)
    older.start()
    assert started.wait(20)
    monkeypatch.undo()
    put(authority.issue("newer"), files)
    newer = Thread(target=tls.reload)
    newer.start()
    newer.join(0.2)
    slow.set()
    older.join()
    newer.join()
    assert served(tls, authority) == "newer"


def test_what_has_not_changed_is_not_read_again(files: TlsFiles):
    tls = ServerTls(files)
    before = tls.current
    poll(tls)
    assert tls.current is before
    assert tls.reload()  # unless it is asked for
    assert tls.current is not before

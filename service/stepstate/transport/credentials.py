"""TLS for grpcio's server, which takes new files without a restart as the lean transport does.

Unlike it, grpcio can't ask clients for a certificate that they need not have.
"""

from __future__ import annotations

import grpc

from stepstate.tls import ClientAuth, LoadedTls, ServerTls


def grpcio_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that ask at each handshake whether there are new files."""
    given = [tls.current]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        newest, before = tls.current, given[0]
        given[0] = newest
        return None if newest is before else _configuration(newest)  # None: nothing has changed

    required = tls.current.files.client_auth is ClientAuth.REQUIRED
    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls.current),
        fetch,  # type: ignore[arg-type] # its documentation says that it may give None
        required,
    )


def _configuration(loaded: LoadedTls) -> grpc.ServerCertificateConfiguration:
    pair = loaded.key_pem, loaded.certificate_pem
    return grpc.ssl_server_certificate_configuration([pair], loaded.client_ca_pem)

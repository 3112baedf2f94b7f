#!/bin/sh
# Makes the credentials of a server for development: an authority, a certificate of it for this
# machine and the servers of compose, and a token of the identity `developer`.
#   deploy/dev-credentials.sh FOLDER
# What is there stays: the token always, the certificate until a week before it expires.
set -eu
umask 077
cd "$1"

new_certificate() { # new_certificate NAME OPTION...
    name=$1
    shift
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 90 \
        -subj "/CN=$name" "$@" 2>/dev/null
}

if ! openssl x509 -in cert.pem -noout -checkend 604800 >/dev/null 2>&1; then
    new_certificate "Stepstate for development" -out ca.pem -keyout ca.key
    new_certificate stepstate -CA ca.pem -CAkey ca.key -out cert.new -keyout key.pem \
        -addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage=serverAuth \
        -addext subjectAltName=DNS:localhost,DNS:stepstate,DNS:stepstate-2,IP:127.0.0.1,IP:::1
    rm ca.key # it could sign a certificate for any name
    chmod 644 ca.pem cert.new
    mv cert.new cert.pem
fi
if [ ! -s token ]; then
    stepstate tokens create developer --tokens-file tokens.json >token
fi

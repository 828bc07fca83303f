#!/bin/sh
# Makes a certificate authority and a server certificate for tests, valid for 30 days, in a new folder. For a server
# that others use, take a certificate of an authority that their machines trust.
#   test_certificate.sh FOLDER [NAME ...]     names and addresses of the server; localhost and 127.0.0.1 by default
set -eu
if [ $# -lt 1 ]; then
    sed -n 's/^#   /usage: /p' "$0" >&2
    exit 2
fi
folder=$1
shift
[ $# -gt 0 ] || set -- localhost 127.0.0.1
names=
for name in "$@"; do
    case $name in *[!0-9.]*) kind=DNS ;; *) kind=IP ;; esac
    names="$names${names:+,}$kind:$name"
done
umask 077
mkdir "$folder"
cd "$folder"
key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
openssl req -x509 $key -days 30 -subj "/CN=damoyolo test authority" -keyout ca.key -out ca.pem \
    -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign
openssl req -new $key -subj "/CN=$1" -keyout server.key -out server.csr
printf 'subjectAltName=%s\nbasicConstraints=CA:false\nextendedKeyUsage=serverAuth\n' "$names" >server.ext
openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile server.ext -out server.crt
# HAProxy takes certificate and key in one file.
cat server.crt server.key >server.pem
rm server.csr server.ext

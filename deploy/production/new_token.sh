#!/bin/sh
# Prints a new token once, and adds its SHA-256 to the file of tokens. HAProxy reads that file when it starts and
# when it is reloaded; it checks the expiry with every request.
#   new_token.sh inference|operations DAYS OWNER [FILE]
set -eu
if [ $# -lt 3 ]; then
    sed -n 's/^#   /usage: /p' "$0" >&2
    exit 2
fi
role=$1 days=$2 owner=$3 file=${4:-/etc/damoyolo/tokens.map}
case $role in inference | operations) ;; *) echo "the role is $role; accepted are inference and operations" >&2; exit 2 ;; esac
case $days in *[!0-9]* | '') echo "days are $days; accepted is a whole number" >&2; exit 2 ;; esac
case $owner in *[!A-Za-z0-9_.@-]* | '') echo "the owner is $owner; accepted are letters, digits and _ . @ -" >&2; exit 2 ;; esac
token=$(openssl rand -hex 32)
digest=$(printf %s "$token" | openssl dgst -sha256 -r | cut -c 1-64 | tr a-f A-F)
umask 027
echo "$digest $role:$(($(date +%s) + days * 86400)):$owner" >>"$file"
echo "$token"

#!/usr/bin/env bash
# The two commands of the README as a newcomer types them: in a fresh clone, with an empty home directory. It takes as
# long as both of them, and downloads packages; what is not committed is not in it.
#   tests/fresh_clone.sh FOLDER                 make demo, then make test, in FOLDER/checkout
#   tests/fresh_clone.sh FOLDER setup           other targets, or options of make
set -euo pipefail
mkdir -p "$1/home"
folder=$(cd "$1" && pwd)
shift
git clone --quiet "$(dirname "$0")/.." "$folder/checkout"
cd "$folder/checkout"

# Of the caller's environment nothing stays but the way to programs and to an index of packages.
kept=(HOME="$folder/home" PATH="$PATH" LANG=C.UTF-8)
while IFS= read -r variable; do kept+=("$variable"); done < <(env | grep -iE '^(PIP_|https?_proxy=|no_proxy=|SSL_CERT)' || true)

if [ $# -gt 0 ]; then
    env -i "${kept[@]}" make "$@"
else
    env -i "${kept[@]}" make demo
    env -i "${kept[@]}" make test
fi

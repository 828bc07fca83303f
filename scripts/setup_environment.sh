# Sourced by demo.sh and test.sh: creates .venv with pinned dependencies and puts it first on the path.
# Usage: setup_environment REQUIREMENTS_FILE...

supported_python() { # Prints the newest Python from 3.10 to 3.13 on the path; $PYTHON takes precedence.
    local candidate
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3.10 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.10 to 3.13 with the venv module found; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}

setup_environment() {
    local python stamp wanted file
    if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        echo "Note: pinned and tested for Linux x86-64; this is $(uname -s) $(uname -m)." >&2
    fi
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        python=$(supported_python) || return 1
        echo "== Creating .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || return 1
    fi
    for file in "$@"; do
        # Installed once: the stamp holds the checksum of the installed pins.
        stamp=.venv/$file.installed
        wanted=$(sha256sum <"$file")
        if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
            echo "== Installing the pinned packages of $file (some GB with torch: minutes)"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r "$file" || return 1
            echo "$wanted" >"$stamp"
        fi
    done
    local java_home
    java_home=$(.venv/bin/python scripts/lib/server/java.py) || return 1
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    # So that a plain `torchserve` in the activated environment finds the same Java.
    if [ "$(readlink -f "$(command -v java)")" != "$(readlink -f "$java_home/bin/java")" ]; then
        ln -sf "$java_home/bin/java" .venv/bin/java
    fi
}

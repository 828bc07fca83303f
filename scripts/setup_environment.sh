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

usable_environment() { # Whether .venv has pip and a supported Python.
    .venv/bin/python -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null
}

create_environment() { # Makes .venv where there is none; one that this function did not make is left alone.
    local python mark=.venv/made-by-setup_environment
    if usable_environment; then return; fi
    if { [ -e .venv ] || [ -L .venv ]; } && [ ! -f "$mark" ]; then
        echo ".venv exists, but has no pip or no Python 3.10 to 3.13. It is left as it is, because these scripts" \
            "did not make it. Move it away (mv .venv .venv.old), or add pip to it" \
            "(.venv/bin/python -m ensurepip), and start again." >&2
        return 1
    fi
    python=$(supported_python) || return 1
    echo "== Creating .venv with $("$python" --version)"
    # Marked first, and emptied but for the mark: what an interruption leaves half done is made again.
    mkdir -p .venv && touch "$mark" && find .venv -mindepth 1 ! -path "$mark" -delete && "$python" -m venv .venv
}

show_progress() { # Reads what pip prints; says how far it is: on a terminal in one line, else every 15 s.
    local line packages=0 doing=collecting pause=15 start=$SECONDS shown=$SECONDS code end='\n'
    if [ -t 2 ]; then pause=1 end='\r'; fi
    while true; do
        code=0; IFS= read -r -t "$pause" line || code=$?
        if [ "$code" -gt 0 ] && [ "$code" -le 128 ]; then break; fi # the end; above 128: nothing for so long
        case $line in
            "Collecting "* | "Processing "*) packages=$((packages + 1)) ;;
            "Installing collected packages"*) doing=installing ;;
        esac
        if [ $((SECONDS - shown)) -ge "$pause" ]; then
            printf "   $doing, %d packages, %d s$end" "$packages" $((SECONDS - start)) >&2
            shown=$SECONDS
        fi
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

pip_install() { # pip_install ENVIRONMENT FILE: what pip prints goes to ENVIRONMENT/pip.log; shown if it fails.
    local log=$1/pip.log failed=
    (set -o pipefail
        "$1/bin/python" -m pip install --progress-bar off --disable-pip-version-check --no-input -r "$2" 2>&1 |
            tee "$log" | show_progress) || failed=yes
    if [ -n "$failed" ]; then
        grep -vE '^ *(Collecting|Processing|Downloading|Using cached|Ignoring|Requirement already)' "$log" >&2
    fi
    [ -z "$failed" ]
}

is_installed() { # is_installed ENVIRONMENT FILE: the stamp holds the checksum of the pins that were installed.
    [ "$(cat "$1/${2##*/}.installed" 2>/dev/null)" = "$(sha256sum <"$2")" ]
}

install_pins() { # install_pins ENVIRONMENT FILE
    pip_install "$1" "$2" && sha256sum <"$2" >"$1/${2##*/}.installed"
}

install_environment() {
    local file java_home
    create_environment || return 1
    for file in "$@"; do
        if is_installed .venv "$file"; then continue; fi
        echo "== Installing the pinned packages of $file (some GB with torch: minutes)"
        install_pins .venv "$file" || return 1
    done
    # So that a plain `torchserve` in the activated environment finds the same Java.
    java_home=$(.venv/bin/python scripts/lib/server/java.py) || return 1
    if [ "$(PATH="$PWD/.venv/bin:$PATH" && readlink -f "$(command -v java)")" != "$(readlink -f "$java_home/bin/java")" ]; then
        ln -sf "$java_home/bin/java" .venv/bin/java
    fi
}

install_clients() { # .venv-clients: other projects' clients, which the tests drive. Their pins exclude some of ours.
    local requirements=tests/clients/requirements.txt
    if is_installed .venv-clients "$requirements"; then return; fi
    echo "== Installing the clients of $requirements into .venv-clients"
    rm -rf .venv-clients
    .venv/bin/python -m venv .venv-clients && install_pins .venv-clients "$requirements"
}

install_triton() { # .venv-triton: a Triton server, and NumPy 1 for its backend, which has all else from .venv.
    local requirements=deploy/triton/requirements.txt packages
    # Names the Python and the folder: those of another .venv are of no use.
    packages=$(.venv/bin/python -c '
import os, sysconfig
print(os.path.realpath(sysconfig.get_path("purelib")))') || return 1
    if is_installed .venv-triton "$requirements" &&
        [ "$(cat .venv-triton/lib/*/site-packages/project.pth 2>/dev/null)" = "$packages" ]; then return; fi
    echo "== Installing the Triton server of $requirements into .venv-triton"
    rm -rf .venv-triton
    .venv/bin/python -m venv .venv-triton || return 1
    .venv-triton/bin/python -c '
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "project.pth").write_text(sys.argv[1] + "\n")' "$packages" || return 1
    # The wheel's dependencies, which exclude some of ours, are those of its Python modules. They are not used.
    PIP_NO_DEPS=1 install_pins .venv-triton "$requirements"
}

one_at_a_time() { # Runs a command; another that starts meanwhile in this folder finds the environments complete.
    (
        trap 'echo "setup: interrupted" >&2; exit 130' INT
        if command -v flock >/dev/null; then flock 9; fi
        "$@"
    ) 9<.
}

setup_clients() {
    one_at_a_time install_clients
}

setup_triton() {
    one_at_a_time install_triton
}

setup_triton_if_possible() { # The wheel is not for every machine: it needs glibc 2.35.
    local code=0
    setup_triton || code=$?
    if [ "$code" -eq 130 ]; then return 130; fi # interrupted
    if [ "$code" -ne 0 ]; then
        echo "== Without Triton, whose tests are skipped: the packages of deploy/triton/requirements.txt cannot be" \
            "installed; the cause is above, and docs/triton.md says what they need" >&2
    fi
}

setup_environment() {
    if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        echo "Note: pinned and tested for Linux x86-64; this is $(uname -s) $(uname -m)." >&2
    fi
    one_at_a_time install_environment "$@" || return
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
}

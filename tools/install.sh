#!/usr/bin/env bash
# Sets up a virtual environment with PyTorch, one OpenMMLab stack and pvt_mm. `make install` calls it:
#   STACK=openmmlab|onedl PYTHON=python3 VENV=.venv JOBS=2 TORCH=2.13.0 bash tools/install.sh
# An environment that is at VENV already, of venv, uv or conda, is used, and so is its PyTorch.
# With the argument `missing` it only prints the system's packages that are not there.
set -euo pipefail
cd "$(dirname "$0")/.."

STACK=${STACK:-openmmlab}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
JOBS=${JOBS:-$(nproc)}
TORCH=${TORCH:-}
CPU_INDEX=${CPU_INDEX:-https://download.pytorch.org/whl/cpu}
OS_RELEASE=${OS_RELEASE:-/etc/os-release}
[[ ! -x $VENV/bin/python ]] || PYTHON=$VENV/bin/python

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

check_python() {
    local version=none
    if command -v "$PYTHON" >/dev/null; then
        version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$PYTHON does not run."
    fi
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        3.14) say 'Python 3.14: every pinned package has files for it, but nothing of pvt_mm was run with it yet.' >&2 ;;
        *) die "pvt_mm needs Python 3.10 to 3.14, and $PYTHON is $version. Either of these brings one; then the same
command again (or name one that is here with PYTHON=/path/to/python3.12):
    uv venv --python 3.12 $VENV
    conda create --yes --prefix $VENV python=3.12" ;;
    esac
}

# Prints debian, fedora or alpine: the family of this system, or its own name.
system() {
    local names
    names=" $(sed -n 's/^ID\(_LIKE\)\?=//p' "$OS_RELEASE" 2>/dev/null | tr -d '"' | xargs) "
    case $names in
        *' debian '* | *' ubuntu '*) echo debian ;;
        *' fedora '* | *' rhel '*) echo fedora ;;
        *' alpine '*) echo alpine ;;
        *) echo "${names%% *}" ;;
    esac
}

# Prints what this system calls the parts that are missing.
missing_packages() {
    local compiler=g++
    [[ $(system) != fedora ]] || compiler=gcc-c++
    command -v g++ >/dev/null || echo "$compiler"
    "$PYTHON" - "$(system)" <<'EOF'
import ctypes
import importlib.util
import os
import sys
import sysconfig

# Headers, venv, and what opencv-python loads when it is imported.
names = {
    'fedora': ('python{}-devel', 'python{}', 'mesa-libGL', 'glib2'),
    'alpine': ('python3-dev', 'python3', 'mesa-gl', 'glib'),
}.get(sys.argv[1], ('python{}-dev', 'python{}-venv', 'libgl1', 'libglib2.0-0'))
version = '%d.%d' % sys.version_info[:2]
headers, environments, *libraries = (name.format(version) for name in names)
if not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')):
    print(headers)
if not all(importlib.util.find_spec(module) for module in ('venv', 'ensurepip')):
    print(environments)
for library, package in zip(('libGL.so.1', 'libgthread-2.0.so.0'), libraries):
    try:
        ctypes.CDLL(library)
    except OSError:
        print(package)
EOF
}

check_system() {
    local missing
    missing=$(missing_packages | xargs)
    [[ -n $missing ]] || return 0
    case $(system) in
        fedora) die "parts of the system are missing; this installs them:
    sudo dnf install -y $missing" ;;
        alpine) die "parts of the system are missing; this installs them (PyTorch has no wheels for Alpine's C library,
musl: an environment at VENV= must have one already):
    sudo apk add $missing" ;;
        debian) die "parts of the system are missing; this installs them:
    sudo apt-get update && sudo apt-get install -y $missing" ;;
        *) die "parts of the system are missing; on Debian and Ubuntu they are called: $missing" ;;
    esac
}

check_stack() {
    [[ -f requirements/$STACK.txt && $STACK =~ ^(openmmlab|onedl)$ ]] \
        || die "STACK=$STACK is not known: say STACK=openmmlab (the default) or STACK=onedl."
    local stamp
    for stamp in "$VENV"/.installed-*; do
        [[ ! -e $stamp || $stamp == "$VENV/.installed-$STACK" ]] \
            || die "$VENV holds the other stack, whose modules have the same names: choose another VENV=."
    done
}

make_environment() {
    if [[ ! -x $VENV/bin/python ]]; then
        say "Making the virtual environment $VENV"
        "$PYTHON" -m venv "$VENV"
    fi
    # uv makes environments without pip.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip
}

pip_install() { "$VENV/bin/python" -m pip install -c requirements/constraints.txt "$@"; }

answers() {
    "$VENV/bin/python" - "$1" 2>/dev/null <<'EOF'
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=15).close()
EOF
}

# TORCH chooses; else the PyTorch that is there stays; else the pinned one, without CUDA where there is no GPU.
install_torch() {
    local found wanted
    found=$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
    wanted=${TORCH:-$(sed -n 's/^torch==//p' requirements/build.txt)}
    if [[ -n $found && ( -z $TORCH || $found == "$wanted" || ${found%%+*} == "$wanted" ) ]]; then
        say "PyTorch $found is there"
        return
    fi
    if [[ ${FORCE_CUDA:-0} != 1 ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        if answers "$CPU_INDEX/torch/"; then
            say "Installing PyTorch $wanted for the CPU, since there is no NVIDIA GPU"
            "$VENV/bin/python" -m pip install --no-deps --index-url "$CPU_INDEX" "torch==$wanted" \
                || say "There is no PyTorch $wanted for the CPU: asking the default index"
        else
            say "$CPU_INDEX cannot be reached: the default index may send a CUDA build of PyTorch, of 3 GB"
        fi
    fi
    pip_install "torch==$wanted"
}

check_python
if [[ ${1:-} == missing ]]; then
    missing_packages
    exit
fi
check_stack
check_system
make_environment
install_torch
say 'Installing the build tools and mmcv'
# shellcheck disable=SC2046  # a list of packages
pip_install $(grep -v -e '^#' -e '^torch' requirements/build.txt)
"$VENV/bin/python" tools/build_mmcv.py --stack "$STACK" --jobs "$JOBS" --constraint requirements/constraints.txt
say "Installing the $STACK stack and the tools for demo, tests, lint and docs"
pip_install -r "requirements/$STACK.txt" -r requirements/demo.txt -r requirements/test.txt -r requirements/lint.txt \
    -r requirements/docs.txt
say 'Installing pvt_mm, editable'
pip_install --no-build-isolation --no-deps -e .
say "Done: $VENV/bin/python has pvt_mm."

#!/usr/bin/env bash
# Sets up a virtual environment with PyTorch, one OpenMMLab stack and pvt_mm. `make install` calls it:
#   STACK=openmmlab|onedl PYTHON=python3 VENV=.venv JOBS=2 bash tools/install.sh
# With the argument `missing` it only prints the Debian/Ubuntu packages that are not there.
set -euo pipefail
cd "$(dirname "$0")/.."

STACK=${STACK:-openmmlab}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
JOBS=${JOBS:-$(nproc)}

say() { printf '\n==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

check_python() {
    command -v "$PYTHON" >/dev/null \
        || die "$PYTHON is not there: install Python 3.10, 3.11 or 3.12, or name one with PYTHON=/path/to/python3.11."
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$PYTHON does not run."
    case $version in
        3.10 | 3.11 | 3.12) ;;
        *) die "pvt_mm needs Python 3.10, 3.11 or 3.12, and $PYTHON is $version: name another with PYTHON=python3.11." ;;
    esac
}

# Prints what Debian and Ubuntu call the parts that are missing.
missing_packages() {
    command -v g++ >/dev/null || echo g++
    "$PYTHON" - <<'EOF'
import ctypes
import importlib.util
import os
import sys
import sysconfig

name = 'python%d.%d' % sys.version_info[:2]
if not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')):
    print(name + '-dev')
if not all(importlib.util.find_spec(module) for module in ('venv', 'ensurepip')):
    print(name + '-venv')
# opencv-python loads these when it is imported.
for library, package in (('libGL.so.1', 'libgl1'), ('libgthread-2.0.so.0', 'libglib2.0-0')):
    try:
        ctypes.CDLL(library)
    except OSError:
        print(package)
EOF
}

check_system() {
    local missing
    missing=$(missing_packages | xargs)
    [[ -z $missing ]] || die "parts of the system are missing; on Debian and Ubuntu this installs them:
    sudo apt-get update && sudo apt-get install -y $missing"
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

pip_install() { "$VENV/bin/python" -m pip install -c requirements/constraints.txt "$@"; }

# Whether mmcv's compiled ops load and run, on the GPU too where they are built for it.
mmcv_works() {
    "$VENV/bin/python" - "$1" "$2" <<'EOF'
import sys
from importlib.metadata import version

import torch

name, wanted = sys.argv[1].split('==')
if version(name) != wanted:
    sys.exit(f'{name} {version(name)} is installed, not {wanted}')
from mmcv.ops import nms

boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 20.0, 30.0, 30.0]])
scores = torch.tensor([0.9, 0.8, 0.7])
for device in sys.argv[2].split(','):
    kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
    if kept != [0, 2]:
        sys.exit(f'nms on {device} keeps boxes {kept} instead of [0, 2]')
EOF
}

# Prints cuda where mmcv's build can use it: PyTorch sees a GPU (or FORCE_CUDA=1 vouches for one)
# and there is a compiler for it; nocompiler where only the latter is missing; else cpu.
mmcv_target() {
    "$VENV/bin/python" - <<'EOF'
import os
import shutil

import torch
from torch.utils.cpp_extension import CUDA_HOME

wanted = torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
found = bool(CUDA_HOME) and shutil.which(os.path.join(CUDA_HOME, 'bin', 'nvcc'))
print('cpu' if not wanted else 'cuda' if found else 'nocompiler')
EOF
}

install_mmcv() {
    local pin devices=cpu
    pin=$(grep -E '^(onedl-)?mmcv==' "requirements/$STACK.txt")
    case $(mmcv_target) in
        cuda) "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && devices=cpu,cuda ;;
        nocompiler)
            say "PyTorch sees a GPU, but there is no CUDA compiler (nvcc): mmcv's ops are built for the CPU only."
            # What mmcv's build asks before it compiles for CUDA.
            export CUDA_VISIBLE_DEVICES='' FORCE_CUDA=0 ;;
    esac
    if mmcv_works "$pin" "$devices" 2>/dev/null; then
        return
    fi
    say "Building $pin with its compiled ops, $JOBS jobs: about 7 minutes on 2 cores."
    export MAX_JOBS=$JOBS
    pip_install --no-build-isolation "$pin" || die "$pin did not build: the compiler's words are above."
    if ! mmcv_works "$pin" "$devices"; then
        say "The ops of that wheel, perhaps one that pip had kept, do not work here: building it again."
        pip_install --no-build-isolation --no-cache-dir --force-reinstall --no-deps \
            --no-binary "${pin%%=*}" "$pin" || die "$pin did not build: the compiler's words are above."
        mmcv_works "$pin" "$devices" || die "$pin was built, but its ops do not work: see the message above."
    fi
}

check_python
if [[ ${1:-} == missing ]]; then
    missing_packages
    exit
fi
check_stack
check_system
if [[ ! -x $VENV/bin/python ]]; then
    say "Making the virtual environment $VENV"
    "$PYTHON" -m venv "$VENV"
fi
say 'Installing PyTorch and the build tools'
pip_install -r requirements/build.txt
install_mmcv
say "Installing the $STACK stack and the tools for demo, tests, lint and docs"
pip_install -r "requirements/$STACK.txt" -r requirements/demo.txt -r requirements/test.txt -r requirements/lint.txt \
    -r requirements/docs.txt
say 'Installing pvt_mm, editable'
pip_install --no-build-isolation --no-deps -e .
say "Done: $VENV/bin/python has pvt_mm."

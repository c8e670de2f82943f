#!/usr/bin/env bash
# Makes .venv for this machine: with NVIDIA GPUs (nvidia-smi lists one) the CUDA set, otherwise the CPU set.
#
#   bash install.sh            everything a run needs
#   bash install.sh --test     and what the tests need
#
# Running it again does nothing until a requirement file, the Python or the device changes.
#   SPICE_PYTHON       which Python makes .venv (3.10, 3.11 or 3.12)
#   SPICE_DEVICE       cpu or cuda, instead of looking for a GPU
#   SPICE_VENV         another place than .venv
#   SPICE_TORCH_INDEX  package index with CPU builds of torch; without one PyPI's CUDA build (several GB) also works
#
# The CPU branch is what the tests run on. The CUDA branch resolves, but has not been run on a machine with a GPU.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
requirements="$root/requirements"
venv="${SPICE_VENV:-$root/.venv}"
torch_version=2.13.0

say() { printf 'install.sh: %s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

with_tests=no
for argument in "$@"; do
  case "$argument" in
    --test) with_tests=yes ;;
    *) fail "unknown argument '$argument'; the only one is --test" ;;
  esac
done

supported() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  if [ -n "${SPICE_PYTHON:-}" ]; then
    supported "$SPICE_PYTHON" || fail "SPICE_PYTHON=$SPICE_PYTHON is not a Python 3.10, 3.11 or 3.12 with venv"
    echo "$SPICE_PYTHON"
    return
  fi
  local name
  for name in python3 python3.12 python3.11 python3.10 python; do
    if supported "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.10, 3.11 or 3.12 with venv found (Debian, Ubuntu: apt-get install python3 python3-venv);" \
    "SPICE_PYTHON=/path/to/python names one that is not on PATH"
}

find_device() {
  case "${SPICE_DEVICE:-auto}" in
    cpu | cuda) echo "$SPICE_DEVICE" ;;
    auto)
      if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
        echo cuda
      else
        echo cpu
      fi
      ;;
    *) fail "SPICE_DEVICE=$SPICE_DEVICE; it is cpu or cuda" ;;
  esac
}

# What is installed is a function of these; their hash is the stamp.
fingerprint() {
  {
    echo "$device" "$root"
    "$venv/bin/python" -c 'import sys; print(sys.version)'
    cat "$requirements"/*.txt "$root/install.sh" "$root/setup.py"
  } | sha256sum | cut -d ' ' -f 1
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip_install() { pip install --quiet --quiet --constraint "$requirements/constraints.txt" "$@"; }

make_venv() {
  local python
  if [ -e "$venv/bin/python" ] && supported "$venv/bin/python"; then
    return
  fi
  python="$(find_python)"
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
}

# PyPI's torch for Linux brings CUDA along: several gigabytes that a CPU machine never uses. So the CPU build is looked
# for first, and PyPI's is what is left when no index has one.
install_torch_cpu() {
  local build="torch==$torch_version+cpu" index="${SPICE_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
  if "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch_version')" \
    2>/dev/null; then
    return
  fi
  say "torch $torch_version, CPU build"
  if [ -z "${SPICE_TORCH_INDEX:-}" ] && pip_install "$build" 2>/dev/null; then
    return
  fi
  if pip_install --retries 1 --timeout 20 --extra-index-url "$index" "$build"; then
    return
  fi
  say "no CPU build of torch at $index (SPICE_TORCH_INDEX names another index); taking PyPI's, which is much larger"
  pip_install "torch==$torch_version"
}

install_cpu() {
  install_torch_cpu
  say "Megatron-Core, transformers and what SGLang's CPU server imports"
  pip_install --requirement "$requirements/cpu.txt"
  say "SGLang, without the CUDA kernels it depends on"
  pip_install --no-deps --requirement "$requirements/cpu-no-deps.txt"
}

install_cuda() {
  say "torch $torch_version, then SGLang and its kernels, Transformer Engine (compiles its torch extension), DALI"
  # Transformer Engine's torch extension is built against the torch in .venv, so that one has to be there before it.
  pip install --quiet "torch==$torch_version" setuptools wheel ninja pybind11
  pip install --quiet --no-build-isolation --requirement "$requirements/cuda.txt"
  # Transformer Engine's library wants a function that cuBLAS has since 13.2, and torch asks for 13.1: without it the import
  # fails with an undefined symbol. (pip says that the two do not go together; the library's interface only grew.)
  pip install --quiet --no-deps nvidia-cublas==13.2.2.2
}

started=$SECONDS
device="$(find_device)"
make_venv
stamp="$venv/.spice-installed"
test_stamp="$venv/.spice-installed-test"
wanted="$(fingerprint)"

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  say "device: $device; Python: $("$venv/bin/python" -c 'import platform; print(platform.python_version())')"
  rm -f "$stamp" "$test_stamp"
  "install_$device"
  pip install --quiet --no-deps --editable "$root"
  echo "$wanted" >"$stamp.tmp" && mv "$stamp.tmp" "$stamp"
  say "done in $((SECONDS - started)) s; \`$venv/bin/python -m megatron_spice doctor\` says what this machine can run"
fi

if [ "$with_tests" = yes ] && [ "$(cat "$test_stamp" 2>/dev/null)" != "$wanted" ]; then
  say "what the tests need"
  pip_install --requirement "$requirements/test.txt"
  [ "$device" = cuda ] || pip_install --no-deps --requirement "$requirements/dali-no-deps.txt"
  echo "$wanted" >"$test_stamp.tmp" && mv "$test_stamp.tmp" "$test_stamp"
fi

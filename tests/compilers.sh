#!/usr/bin/env bash
# compilers.sh PYTHON OPTIMIZATION [NAME...]: compiles the CPU sources with every compiler that is there, or with those
# named, warnings as errors, for every instruction set, and says which ones are not there. Nothing is linked, run or
# installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") optimization=$2 wanted=" ${*:3} "
cmake=$(dirname "$python")/cmake
[ -x "$cmake" ] || cmake=cmake
torch=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
skipped="" tried=0

try() { # name, compiler, further options of CMake...
  local name=$1 compiler=$2
  shift 2
  case "$wanted" in "  " | *" $name "*) ;; *) return ;; esac
  if ! command -v "$compiler" >/dev/null; then
    skipped+=" $name"
    return
  fi
  echo "== $name: $("$compiler" --version | head -1)"
  PATH="$(dirname "$python"):$PATH" "$cmake" -S . -B "build/compilers/$name" -G Ninja --log-level=WARNING \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=Check -DCMAKE_CXX_FLAGS_CHECK="$optimization -DNDEBUG -Werror" \
    -DPython_EXECUTABLE="$python" -DKEGFAST_TORCH_DIR="$torch" -DFORCE_CUDA=0 "$@"
  PATH="$(dirname "$python"):$PATH" "$cmake" --build "build/compilers/$name" --target kegfast_plans kegfast_objects -- --quiet
  tried=$((tried + 1))
}

aarch64=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64)
for version in 11 12 13 14; do try "g++-$version" "g++-$version"; done
for version in 14 15 16 17 18 19; do try "clang-$version" "clang++-$version"; done
try aarch64-g++ aarch64-linux-gnu-g++ "${aarch64[@]}"
if command -v aarch64-linux-gnu-g++ >/dev/null; then # whose C++ library clang takes
  try aarch64-clang clang++-19 "${aarch64[@]}" -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu
fi
echo "compilers: $tried passed; not here:${skipped:- none}"

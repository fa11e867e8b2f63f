#!/usr/bin/env bash
# Tests of operators with a native part that AddressSanitizer and UBSan watch: sanitized.sh TREE TEST...
#
# TREE is a build of type Sanitize. Its _C takes the place of the usual one in a package of links; nothing else is built
# with sanitizers, so their libraries are loaded ahead of Python's. What torch and Python keep until the end are no leaks.
set -euo pipefail
tree=$(realpath "$1")
shift
library=$(echo "$tree"/_C*.so)
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[^=]*=//p' "$tree/CMakeCache.txt")
package=$tree/site/kegfast
rm -rf "$package" && mkdir -p "$package"
ln -s "$PWD"/kegfast/* "$package"
rm -f "$package"/_C*.so
ln -s "$library" "$package"
# Tests import from both, some in processes of their own.
for folder in benchmarks tests; do ln -sfn "$PWD/$folder" "$tree/site/$folder"; done

# libstdc++ too: AddressSanitizer looks for its functions when it starts, before Python has loaded anything.
preload=$(for name in libasan.so libubsan.so libstdc++.so; do "$compiler" -print-file-name=$name; done)
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$tree/site PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=PASSIVE
run() { LD_PRELOAD=$(echo $preload) python -P "$@"; }

run -c "import kegfast.ops._native as n, sys; sys.exit(not n._C.__file__.startswith('$tree/site'))"
run -m pytest -p no:cacheprovider --capture=sys -o "pythonpath=tests tests/fuzz" "$@"

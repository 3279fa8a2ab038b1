#!/bin/sh
# Make .venv-peers: the libraries of requirements.txt from the package index. make bench calls it.
#     benchmarks/peers/install.sh [PYTHON] [EXTRA_INDEX_URL]        torch for the CPU alone: https://download.pytorch.org/whl/cpu
set -e
cd "$(dirname "$0")/../.."
requirements=benchmarks/peers/requirements.txt
extra=${2:+--extra-index-url $2}
"${1:-python3}" -m venv .venv-peers
pip=".venv-peers/bin/pip install --quiet --disable-pip-version-check $extra"
# DeepSpeed's build imports torch, and compiles no operator with DS_BUILD_OPS=0
# shellcheck disable=SC2086
$pip setuptools wheel && $pip $(grep -E '^(torch|numpy)==' $requirements) && \
	DS_BUILD_OPS=0 $pip --no-build-isolation -r $requirements
touch .venv-peers/installed

#!/usr/bin/env bash
# Send the package and the notebooks to Kaggle.
#
#   kaggle/push.sh NAME               say what would be done for the account NAME (kaggle.com/NAME)
#   kaggle/push.sh NAME --for-real    do it
#
# Doing it needs the `kaggle` command (pip install kaggle) and an API token from kaggle.com/settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

owner="${1:-}"
if [[ -z "$owner" || "$owner" == -* || $# -gt 2 || ($# -eq 2 && "$2" != --for-real) ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=runs/kaggle

if [[ "${2:-}" == --for-real ]]; then
    command -v kaggle >/dev/null || { echo "push.sh: no kaggle command; pip install kaggle" >&2; exit 2; }
    run() { echo "+ $*"; "$@"; }
else
    echo "Dry run; add --for-real to do it."
    run() { echo "would run: $*"; }
fi

make --silent install
.venv/bin/python kaggle/build.py --owner "$owner" --out "$out"

# --dir-mode zip: without it the package folder would be left behind.
if [[ "${2:-}" == --for-real ]] && kaggle datasets status "$owner/deepfake-utils" >/dev/null 2>&1; then
    run kaggle datasets version -p "$out/dataset" --dir-mode zip -m "update"
else
    run kaggle datasets create -p "$out/dataset" --dir-mode zip
fi
if [[ "${2:-}" == --for-real ]]; then
    for _ in {1..60}; do
        [[ "$(kaggle datasets status "$owner/deepfake-utils" 2>/dev/null)" == *ready* ]] && break
        sleep 5
    done
fi
for notebook in 01_model_research 02_train 03_error_analysis; do
    run kaggle kernels push -p "$out/$notebook"
done
echo "03 reads what 02 saved: once 02 has finished, run 03 again on Kaggle."

#!/usr/bin/env bash
# Send the package and notebooks to Kaggle, which runs each as soon as it arrives and counts that against the quota.
#
#   kaggle/push.sh NAME                        say what would be done for the account NAME (kaggle.com/NAME)
#   kaggle/push.sh NAME --for-real             do it with notebooks 01 and 02
#   kaggle/push.sh NAME [--for-real] 03        with notebook 03 alone, once 02 has finished there: it reads 02's output
#
# Doing it needs the `kaggle` command (pip install kaggle) and an API token from kaggle.com/settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,8s/^# \{0,1\}//p' kaggle/push.sh >&2
    exit 2
}

owner="${1:-}"
[[ -n "$owner" && "$owner" != -* ]] || usage
shift
real="" numbers=()
for word in "$@"; do
    case "$word" in
        --for-real) real=yes ;;
        01 | 02 | 03) numbers+=("$word") ;;
        *) usage ;;
    esac
done
[[ ${#numbers[@]} -gt 0 ]] || numbers=(01 02)
out=runs/kaggle

if [[ "$real" ]]; then
    command -v kaggle >/dev/null || { echo "push.sh: no kaggle command; pip install kaggle" >&2; exit 2; }
    run() { echo "+ $*"; "$@"; }
else
    echo "Dry run; add --for-real to do it."
    run() { echo "would run: $*"; }
fi

make --silent install
.venv/bin/python kaggle/build.py --owner "$owner" --out "$out"

# --dir-mode zip: without it the package folder would be left behind.
if [[ "$real" ]] && kaggle datasets status "$owner/deepfake-utils" >/dev/null 2>&1; then
    run kaggle datasets version -p "$out/dataset" --dir-mode zip -m "update"
else
    run kaggle datasets create -p "$out/dataset" --dir-mode zip
fi
if [[ "$real" ]]; then
    for _ in {1..60}; do
        [[ "$(kaggle datasets status "$owner/deepfake-utils" 2>/dev/null)" == *ready* ]] && break
        sleep 5
    done
fi
for number in "${numbers[@]}"; do
    run kaggle kernels push -p "$(echo "$out/$number"_*)"
done
[[ " ${numbers[*]} " == *" 03 "* ]] || echo "Notebook 03 reads what 02 saves: push it with 03 once 02 has finished."

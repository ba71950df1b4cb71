#!/usr/bin/env bash
# Send the package and notebooks to Kaggle, which runs each as soon as it arrives and counts that against the quota.
#
#   kaggle/push.sh NAME                        say what would be done for the account NAME (kaggle.com/NAME)
#   kaggle/push.sh NAME --for-real             do it with notebooks 01 and 02
#   kaggle/push.sh NAME [--for-real] 03        with notebook 03 alone, once 02 has finished there: it reads 02's output
#   kaggle/push.sh NAME [--for-real] 04        with notebook 04 alone, on the weights that come with the package
#
# Saying needs Python 3.11 or later and nothing else (PYTHON=... names one). Doing needs the `kaggle` command
# (pip install kaggle, 2.2.5 or later) and an API token from kaggle.com/settings, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,10s/^# \{0,1\}//p' kaggle/push.sh >&2
    exit 2
}

owner="${1:-}"
[[ -n "$owner" && "$owner" != -* ]] || usage
shift
real="" numbers=()
for word in "$@"; do
    case "$word" in
        --for-real) real=yes ;;
        01 | 02 | 03 | 04) numbers+=("$word") ;;
        *) usage ;;
    esac
done
[[ ${#numbers[@]} -gt 0 ]] || numbers=(01 02)
out=runs/kaggle
package="$owner/deepfake-utils"
wait_s="${KAGGLE_WAIT_S:-600}" # for Kaggle to unpack the package
python="${PYTHON:-python3}"

fail() { echo "push.sh: $*" >&2; exit 1; }

# The kaggle command prints its errors and returns 0. So what it says is shown, kept, and never trusted: after each step
# the state is asked for that the step should have made.
said=""
run() {
    if [[ ! "$real" ]]; then echo "would run: $*"; return; fi
    echo "+ $*"
    said="$("$@" 2>&1)" || fail "$* failed: $said"
    echo "$said"
}

# "STATUS VERSION" of the package on Kaggle, such as "ready 3"; "absent 0" where there is none.
package_state() {
    kaggle datasets status "$package" --format 'json(status,current_version_number)' 2>/dev/null | "$python" -c '
import json, re, sys
found, said = "absent 0", sys.stdin.read()
for brace in re.finditer("{", said):  # before it may be warnings, such as of an outdated kaggle command
    try:
        state, _ = json.JSONDecoder().raw_decode(said, brace.start())
        found = "{} {}".format(state["status"], int(state["current_version_number"]))
    except (ValueError, KeyError, TypeError):
        pass
print(found)'
}

[[ ! "$real" ]] || command -v kaggle >/dev/null || { echo "push.sh: no kaggle command; pip install kaggle" >&2; exit 2; }
[[ "$real" ]] || echo "Dry run; add --for-real to do it."
"$python" kaggle/build.py --owner "$owner" --out "$out"

# --dir-mode zip: without it the package folder would be left behind.
status=absent version=0
[[ ! "$real" ]] || read -r status version < <(package_state)
if [[ "$status" == absent ]]; then
    run kaggle datasets create -p "$out/dataset" --dir-mode zip
else
    run kaggle datasets version -p "$out/dataset" --dir-mode zip -m "update"
fi
if [[ "$real" ]]; then
    end_s=$((SECONDS + wait_s))
    while read -r status now < <(package_state) && [[ "$status" != ready || "$now" -le "$version" ]]; do
        ((SECONDS < end_s)) || fail "after $wait_s s $package is '$status', version $now, where version $((version + 1))" \
            "was expected to be ready; no notebook was pushed. See https://www.kaggle.com/datasets/$package"
        sleep 5
    done
    echo "$package, version $now, is ready"
fi

for number in "${numbers[@]}"; do
    folder="$(echo "$out/$number"_*)"
    run kaggle kernels push -p "$folder"
    if [[ "$real" ]]; then
        [[ "$said" != *"could not"* ]] || fail "$folder was pushed without something that it attaches: stop that run"
        [[ "$said" == *"successfully pushed"* ]] || fail "$folder was not pushed"
        kernel="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["id"])' "$folder/kernel-metadata.json")"
        run kaggle kernels status "$kernel"
        [[ "$said" == *"has status"* ]] || fail "Kaggle knows no run of $kernel"
    fi
done
[[ " ${numbers[*]} " != *" 02 "* ]] || echo "Notebook 03 reads what 02 saves: push it with 03 once 02 has finished."

#!/bin/bash
# run.sh JOBS SUITE [ARGUMENTS]: runs the suite, JOBS test files at a time, since
# most cases wait more than they compute. Prints the output of a file in which
# something failed, a line for each file, and the sum.
most=$1
shift
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# "[doctest] test cases: 9 | 8 passed | 1 failed | 0 skipped"
counts() {
  awk '/^\[doctest\] test cases:/ { passed = $6; failed = $9 }
       END { print passed + 0, failed + 0 }' "$1"
}

run() { # FILE
  local name=${1##*/} status passed failed
  "${suite[@]}" "-sf=*/$name" >"$logs/$name" 2>&1
  status=$?
  read -r passed failed < <(counts "$logs/$name")
  if ((status != 0 && failed == 0)); then failed=1; fi # it crashed
  if ((failed > 0)); then
    cat "$logs/$name"
    awk '/^TEST CASE:/ { sub(/^TEST CASE: */, ""); name = $0 }
         /ERROR/ && !seen[name]++ { print "failed: " name }' "$logs/$name" \
      >>"$logs/failures"
  fi
  if ((passed + failed > 0)); then
    echo "$name: $passed passed, $failed failed" | tee -a "$logs/all"
  fi
}

suite=("$@")
for file in $(ls -S tests/*_test.cpp); do # the longest ones first
  while (($(jobs -rp | wc -l) >= most)); do wait -n; done
  run "$file" &
done
wait
cat "$logs/failures" 2>/dev/null
awk '{ passed += $2; failed += $4 }
     END { print passed + 0 " passed, " failed + 0 " failed"
           exit failed > 0 }' "$logs/all"

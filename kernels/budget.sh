#!/usr/bin/env bash
# budget.sh CUOBJDUMP OBJECTS_DIR: writes the static part of BUDGET.md from what nvcc made of the kernels: registers, shared memory,
# threads that a multiprocessor's registers hold, tensor-core and asynchronous copy instructions, and their share of the main loop. Listed are
# the files with products, on sm_80 and, files *_sm90a, on sm_90a. CHECK=1 compares with BUDGET.md and does not write it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dump=$1 objects=$2
plain() { c++filt | sed -E 's/\(anonymous namespace\)::?//g; s/^void //; s/\(.*//; s/bool\)//g'; }
rows=$(mktemp)
trap 'rm -f "$rows" "$rows".*' EXIT
count() { # NAME: rows of the kernels of a file, to $rows.NAME
  local rows=$rows.$1 o=$objects/$1.o arch=sm_80
  [[ $1 == *_sm90a ]] && arch=sm_90a
  "$dump" -res-usage -arch "$arch" "$o" 2>/dev/null | awk -v arch="$arch" '
    /Function / { name = $2; sub(/:$/, "", name) }
    /REG:/ { for (i = 1; i <= NF; i++) { split($i, a, ":"); if (a[1] == "REG") r = a[2]; if (a[1] == "SHARED") h = a[2] }
      print name, arch, r, h }' >"$rows.res"
  # A loop is what lies between a branch back and its target. The main loop is that with the most tensor instructions
  # among those that share nothing with a smaller one: code moved out of line jumps back as well, over much that is no loop.
  "$dump" -sass -arch "$arch" "$o" 2>/dev/null | awk '
    function hex(s,  i, v) { v = 0; s = tolower(s); for (i = 1; i <= length(s); i++) v = v * 16 + index("0123456789abcdef", substr(s, i, 1)) - 1; return v }
    function tensor(op) { return op ~ /^(HMMA|HGMMA|UTCHMMA)$/ }
    function flush(  i, j, k, inner, best, len) {
      if (name == "") return
      best = 0; len = 0
      for (j = 0; j < loops; j++) {
        many[j] = products[j] = 0
        for (k = 0; k < n; k++) if (addr[k] >= from[j] && addr[k] <= to[j]) { many[j]++; products[j] += tensor(ops[k]) }
      }
      for (j = 0; j < loops; j++) {
        inner = products[j] > 0
        for (i = 0; i < loops; i++) if (i != j && products[i] && from[i] <= to[j] && to[i] >= from[j] && many[i] < many[j]) inner = 0
        if (inner && (products[j] > best || (products[j] == best && many[j] < len))) { best = products[j]; len = many[j] }
      }
      print name, c["HMMA"] + 0, c["HGMMA"] + 0, c["LDGSTS"] + 0, c["UTMALDG"] + 0, c["LDSM"] + 0, best, len
    }
    /Function : / { flush(); name = $3; n = loops = 0; delete c; next }
    /^ *\/\*[0-9a-f]+\*\// {
      a = $1; gsub(/[\/*]/, "", a); op = $2; rest = 3; if (op ~ /^@/) { op = $3; rest = 4 }
      sub(/[.;].*/, "", op); if (op == "NOP") next
      addr[n] = hex(a); ops[n++] = op; c[op]++
      if (op == "BRA" && match($0, /0x[0-9a-f]+/)) { t = hex(substr($0, RSTART + 2, RLENGTH - 2)); if (t < addr[n - 1]) { from[loops] = t; to[loops++] = addr[n - 1] } } }
    END { flush() }' >"$rows.sass"
  awk 'NR == FNR { s[$1] = $2 " " $3 " " $4 " " $5 " " $6 " " $7 " " $8; next } $1 in s { print $0, s[$1] }' "$rows.sass" "$rows.res" >"$rows"
}
files=(attention attention_sm90a gemm gemm_sm90a head_latency) running=()
for name in "${files[@]}"; do
  [ -f "$objects/$name.o" ] || { echo "budget.sh: no $objects/$name.o: make cuda builds it" >&2; exit 1; }
  count "$name" & running+=($!)
done
for job in "${running[@]}"; do wait "$job" || { echo "budget.sh: $dump failed" >&2; exit 1; }; done
for name in "${files[@]}"; do
  [ -s "$rows.$name" ] || { echo "budget.sh: no kernel in $objects/$name.o" >&2; exit 1; }
  cat "$rows.$name" >>"$rows"
done
paste -d'|' <(cut -d' ' -f1 "$rows" | plain) <(cut -d' ' -f2- "$rows") | sort -t'|' -k1,1 -k2,2 | awk -F'|' '
  BEGIN { print "| kernel | arch | registers | static shared | threads by registers | HMMA | HGMMA | LDGSTS | UTMALDG | LDSM | main loop: tensor of all | share |"
          print "|---|---|---|---|---|---|---|---|---|---|---|---|" }
  # Registers come in units of 256 a warp out of 65,536.
  { split($2, v, " "); warps = int(65536 / (int((v[2] * 32 + 255) / 256) * 256)); warps -= warps % 4; if (warps > 64) warps = 64
    share = v[10] ? sprintf("%.1f %%", 100 * v[9] / v[10]) : "-"
    printf "| `%s` | %s | %d | %d | %d | %d | %d | %d | %d | %d | %d of %d | %s |\n", $1, v[1], v[2], v[3], warps * 32, v[4], v[5], v[6], v[7], v[8], v[9], v[10], share }' >"$rows.table"
awk -v table="$rows.table" '
  /^<!-- static:/ { print; print ""; while ((getline line < table) > 0) print line; print ""; skip = 1; next }
  /^<!-- end of static -->/ { skip = 0 }
  !skip { print }' "$here/BUDGET.md" >"$rows.md"
if [ -n "${CHECK:-}" ]; then
  diff "$here/BUDGET.md" "$rows.md" || { echo "kernels/BUDGET.md is not what the compiler makes now: make budget" >&2; exit 1; }
else
  cat "$rows.md" >"$here/BUDGET.md"
fi

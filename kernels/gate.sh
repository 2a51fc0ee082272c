#!/usr/bin/env bash
# gate.sh CUOBJDUMP OBJECTS_DIR [TABLE]: checks what nvcc made of the kernels against budget.txt, without a GPU: registers,
# stack frames and local memory of every kernel on every architecture, and that tensor-core and asynchronous
# copy instructions are where they should be. Writes one line a kernel and architecture to TABLE.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dump=$1 objects=$2 table=${3:-$2/kernels.txt}
plain() { c++filt | sed -E 's/\(anonymous namespace\)::?//g; s/^void //; s/\(.*//; s/bool\)//g'; }

# 1. Resources: architecture, kernel, registers, stack, local memory, static shared memory.
for o in "$objects"/*.o; do
  "$dump" -res-usage "$o" 2>/dev/null
done | awk '
  /^arch = / { arch = $3 }
  /Function / { name = $2; sub(/:$/, "", name) }
  /REG:/ { r = s = l = h = 0
    for (i = 1; i <= NF; i++) { split($i, a, ":"); if (a[1] == "REG") r = a[2]; if (a[1] == "STACK") s = a[2]; if (a[1] == "LOCAL") l = a[2]; if (a[1] == "SHARED") h = a[2] }
    print name, arch, r, s, l, h }' >"$objects/resources.raw"
cut -d' ' -f1 "$objects/resources.raw" | plain >"$objects/names.raw"
# A name's arguments may hold blanks; they go last.
paste -d' ' <(cut -d' ' -f2- "$objects/resources.raw") "$objects/names.raw" | sort -k6 -k1,1 >"$table"

# 2. Instructions of the kernels that must have some.
sass() { # ARCH OBJECT → kernel, total, and a count of each opcode that a budget names
  "$dump" -sass -arch "$1" "$2" 2>/dev/null | awk '
    /Function : / { name = $3; next }
    /^ *\/\*[0-9a-f]+\*\// { n = split($0, f, " "); op = f[2]; if (op ~ /^@/) op = f[3]; sub(/[.;].*/, "", op); count[name " " op]++ }
    END { for (k in count) print k, count[k] }'
}
for o in "$objects"/*.o; do
  case $(basename "$o") in
  *_sm90a.o) sass sm_90a "$o" ;;
  *) sass sm_80 "$o"; [ -n "${GATE_ARCH:-}" ] && sass "$GATE_ARCH" "$o" ;;
  esac
done >"$objects/opcodes.raw"
paste -d' ' <(cut -d' ' -f2- "$objects/opcodes.raw") <(cut -d' ' -f1 "$objects/opcodes.raw" | plain) >"$objects/opcodes.txt"

# 3. The verdict.
awk -v table="$table" '
  function base(s) { sub(/<.*/, "", s); return s }
  FILENAME ~ /budget.txt$/ { if ($1 !~ /^#/ && NF >= 3) { most[$1] = $2; must[$1] = $3 } next }
  FILENAME == table { k = base($6); seen++
    if (!(k in most)) { print "no budget for kernel " k; bad++; next }
    if ($2 > most[k]) { print $0 ": more than " most[k] " registers"; bad++ }
    if ($3 > 0 || $4 > 0) { print $0 ": a stack frame or local memory"; bad++ }
    present[k] = 1; next }
  { name = $3; for (i = 4; i <= NF; i++) name = name " " $i; have[name " " $1] += $2; kernels[name] = 1 }
  END {
    for (name in kernels) { k = base(name); n = split(must[k], a, ","); found++
      for (i = 1; i <= n; i++) if (a[i] != "-" && !((name " " a[i]) in have)) { print name ": no " a[i] " in its machine code"; bad++ } }
    for (k in most) if (!(k in present)) { print "budget for a kernel that is not there: " k; bad++ }
    printf "%d kernels on their architectures, %d looked into: %s\n", seen, found, bad ? bad " beyond their budget" : "all within their budget"
    exit bad || seen == 0 || found == 0
  }' "$here/budget.txt" "$table" "$objects/opcodes.txt"

#!/usr/bin/env bash
# access.sh: writes kernels/ACCESS.md's table, how the kernels use shared and global memory, from what the emulator's check build
# counts (check.cpp). `make emu-report` calls this.
#
#   access.sh              runs small cases of the table that take every kernel which its quick cases take (about 20 minutes of a core)
#   access.sh check FILE   writes nothing: fails unless FILE (MARGO_EMU_REPORT, runtime.h) makes a table of kernels that are all in
#                          ACCESS.md, with figures that can be
#   REPORT=FILE access.sh  the table from FILE, counted before
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
report=${REPORT:-$work/report}
if [ "${1:-}" = check ]; then
  report=${2:?FILE}
elif [ -z "${REPORT:-}" ]; then
  make --no-print-directory -s -C kernels/emu OUT="$PWD/bin" SAN=check
  export MARGO_EMU_PLUGIN=$PWD/bin/libmargo_emu_check.so MARGO_EMU_REPORT=$report
  go test -c -o "$work/tests" ./cuda
  cd cuda
  part() { # CAPABILITY MULTIPROCESSORS TESTS
    MARGO_EMU_CC=$1 MARGO_EMU_SMS=$2 "$work/tests" -test.timeout 2h -test.run "$3"
  }
  part 80 4 'TestConformance/(norm|gated|rows|cast|fill|timestep|normal|diffusion|patchify|unpatchify|group|categorical|conv2d|head)'
  part 80 4 'TestConformance/^gemm$/./^(113x203x71|37x75x67|21x70x48|9x40x32|8x64x64|700x33x9|19x77x101|16x40)'
  part 80 4 'TestConformance/^(paged_)?attention$/./(whole_tiles|q=.21_40.|aligned|block=16_q=.1_1_1.|32_block)'
  part 90 4 'TestConformance/^(gemm|attention)$/^bf16$/(whole_tiles|aligned|^9x40x32|^8x64x64|21x70x48)'
  part 90 1 'TestConformance/^(gemm|attention)$/^bf16$/(1x64_.*whole_tiles|^9x40x32|^8x64x64)' # the largest blocks
  part 80 4 'TestHeadLatency/^head_steps$/^bf16$/(^n=[1-5]_c=(1|4|16)_w=(32|48|64|128)_)'
  cd ..
  # Every tile of Hopper's products, which the table's small shapes do not choose.
  make --no-print-directory -s -C kernels/emu OUT="$PWD/bin" SAN=check "$PWD/bin/emu-check/gemm_sm90a_test"
  MARGO_EMU_CC=90 MARGO_EMU_REPORT=$work/tiles bin/emu-check/gemm_sm90a_test small
  grep '^gemm_sm90a' "$work/tiles" >>"$report"
fi
awk '
  { if (!($1 in launches)) names[++count] = $1
    launches[$1]++; kind = ""
    for (i = 2; i <= NF; i++) {
      at = index($i, "="); key = substr($i, 1, at - 1); value = substr($i, at + 1)
      if (key ~ /^(ldmatrix|global\.load|global\.store|shared\.load|shared\.store)$/) { kind = key; last = value }
      else if (key == "conflicts") { waves[$1, kind] += value * last; least[$1, kind] += last }
      else if (key == "waves") waves[$1, kind] += value
      else if (key == "least") least[$1, kind] += value
      else if (key == "worst") { # FILE:LINE:WAVES/LEAST
        match(value, /:[0-9]+\/[0-9]+$/); line = substr(value, 1, RSTART - 1); split(substr(value, RSTART + 1), w, "/"); split(kind, m, ".")
        extra[$1, m[1], line] += w[1] - w[2]
        if (extra[$1, m[1], line] > most[$1, m[1]]) { most[$1, m[1]] = extra[$1, m[1], line]; worst[$1, m[1]] = line }
      }
    } }
  function turns(k, kind) { return least[k, kind] ? sprintf("%.2f", waves[k, kind] / least[k, kind]) : "" }
  function used(k, kind) { return waves[k, kind] ? sprintf("%.0f %%", 100 * least[k, kind] / waves[k, kind]) : "" }
  function place(k, memory) { return worst[k, memory] ? "`" worst[k, memory] "`" : "" }
  END { for (i = 1; i <= count; i++) {
      k = names[i]
      printf "| `%s` | %d | %s | %s | %s | %s | %s | %s | %s |\n", k, launches[k], turns(k, "ldmatrix"), turns(k, "shared.load"), turns(k, "shared.store"),
        place(k, "shared"), used(k, "global.load"), used(k, "global.store"), place(k, "global")
    } }' "$report" | sort >"$work/rows"
if [ "${1:-}" = check ]; then
  awk -F ' *[|] *' -v of="$report" '
    FNR == NR { known[$2] = 1; next }
    $5 $6 $8 $9 == "" { next } # of the plain build
    { rows++
      if (!($2 in known)) { print "kernels/ACCESS.md has no row of " $2; bad = 1 }
      for (i = 4; i <= 9; i++) {
        if (i < 7 && $i != "" && ($i + 0 < 1 || $i + 0 > 32)) { print $2 ": " $i " turns of the banks over the least"; bad = 1 }
        if (i > 7 && $i != "" && ($i + 0 <= 0 || $i + 0 > 100)) { print $2 ": " $i " of sectors"; bad = 1 }
        counted[i] += $i != ""
      } }
    END { if (!counted[8] || !counted[9]) { print "no accesses counted in " of; bad = 1 }
      print rows + 0 " kernels counted"; exit bad }' kernels/ACCESS.md "$work/rows"
  exit
fi
awk -v rows="$work/rows" '
  /^<!-- table:/ { print; print ""
    print "| kernel | launches | ldmatrix | shared loads | shared stores | costs most | global loads | global stores | costs most |"
    print "|---|---|---|---|---|---|---|---|---|"
    while ((getline line < rows) > 0) print line
    print ""; skip = 1; next }
  /^<!-- end of table -->/ { skip = 0 }
  !skip { print }' kernels/ACCESS.md >"$work/md"
cat "$work/md" >kernels/ACCESS.md

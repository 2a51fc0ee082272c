package ptx

import (
	"fmt"
	"math"
	"math/bits"
)

// errLanesMissing makes the lanes that have come wait for the rest of the mask.
var errLanesMissing = fmt.Errorf("lanes of the mask have not come")

// collectives are built with their warp in view. Filled by init, which breaks the circle of references.
var collectives map[string]func(in *instr, mods []string, t string) error

func init() {
	collectives = map[string]func(in *instr, mods []string, t string) error{
		"shfl": shfl, "vote": vote, "activemask": activemask, "bar": barrier, "barrier": barrier, "cp": cpAsync, "ldmatrix": ldmatrix, "mma": mma,
		"mbarrier": mbarrierOp, "prefetch": prefetch, "wgmma": wgmma, "setmaxnreg": setmaxnreg, "elect": elect,
	}
}

// together runs f once all lanes of the mask have come; a mask of nil is the whole warp.
func (in *instr) together(mask *operand, f func(w *warp, lanes uint32) error) {
	in.all = true
	in.run = func(w *warp, lanes uint32) error {
		want := uint32(math.MaxUint32)
		for l := range 32 {
			if mask == nil || lanes>>l&1 == 0 {
				continue
			}
			want = uint32(mask.get(w, l))
			if want>>l&1 == 0 {
				return fmt.Errorf("lane %d is not in its mask %08x", l, want)
			}
		}
		if gone := want &^ w.live(); gone != 0 {
			return fmt.Errorf("lanes %08x of the mask have left", gone)
		}
		if want&^lanes != 0 {
			return errLanesMissing
		}
		return f(w, lanes)
	}
}

// shfl: d[|p], a, b, c, mask. c holds the clamp in bits 0..4 and the mask of segments in 8..12.
func shfl(in *instr, mods []string, t string) error {
	if len(mods) != 2 || mods[0] != "sync" || t != "b32" || len(in.args) != 5 {
		return errUnknown
	}
	kind := mods[1]
	if kind != "bfly" && kind != "down" && kind != "up" && kind != "idx" {
		return errUnknown
	}
	d := in.args[0]
	in.together(&in.args[4], func(w *warp, lanes uint32) error {
		var out, ok [32]uint64
		for l := range 32 {
			if lanes>>l&1 == 0 {
				continue
			}
			b, c := int(in.args[2].get(w, l)&31), in.args[3].get(w, l)
			clamp, seg := int(c&31), int(c>>8&31)
			low, high := l&seg, l&seg|clamp&^seg
			from, in0 := l, false
			switch kind {
			case "up":
				from = l - b
				in0 = from >= high // clamp 0: high is the first lane of the segment
			case "down":
				from = l + b
				in0 = from <= high
			case "bfly":
				from = l ^ b
				in0 = from <= high
			case "idx":
				from = low | b&^seg
				in0 = from <= high
			}
			if !in0 {
				from = l
			} else {
				ok[l] = 1
			}
			if lanes>>from&1 == 0 {
				return fmt.Errorf("lane %d reads lane %d, which is not there", l, from)
			}
			out[l] = shapeOf(t).norm(in.args[1].get(w, from))
		}
		for l := range 32 {
			if lanes>>l&1 != 0 {
				w.regs[d.reg*32+l] = out[l]
				if d.second >= 0 {
					w.regs[d.second*32+l] = ok[l]
				}
			}
		}
		return nil
	})
	return nil
}

// vote.sync.{any,all,uni,ballot}: d, p, mask.
func vote(in *instr, mods []string, t string) error {
	if len(mods) != 2 || mods[0] != "sync" || len(in.args) != 3 {
		return errUnknown
	}
	kind := mods[1]
	if !(kind == "ballot" && t == "b32") && !((kind == "any" || kind == "all" || kind == "uni") && t == "pred") {
		return errUnknown
	}
	in.together(&in.args[2], func(w *warp, lanes uint32) error {
		var set uint32
		for l := range 32 {
			if lanes>>l&1 != 0 && in.args[1].get(w, l)&1 != 0 {
				set |= 1 << l
			}
		}
		v := uint64(set)
		yes := map[string]bool{"any": set != 0, "all": set == lanes, "uni": set == 0 || set == lanes}[kind]
		if kind != "ballot" {
			v = 0
			if yes {
				v = 1
			}
		}
		for l := range 32 {
			if lanes>>l&1 != 0 {
				w.regs[in.args[0].reg*32+l] = v
			}
		}
		return nil
	})
	return nil
}

func activemask(in *instr, mods []string, t string) error {
	if len(mods) != 0 || t != "b32" {
		return errUnknown
	}
	in.run = func(w *warp, lanes uint32) error {
		for l := range 32 {
			if lanes>>l&1 != 0 {
				w.regs[in.args[0].reg*32+l] = uint64(lanes)
			}
		}
		return nil
	}
	return in.want(1)
}

// barrier: bar.warp.sync mask; bar.sync id[, threads].
func barrier(in *instr, mods []string, _ string) error {
	if in.op[0] == "bar" && len(mods) == 2 && mods[0] == "warp" && mods[1] == "sync" && len(in.args) == 1 {
		in.together(&in.args[0], func(*warp, uint32) error { return nil })
		return nil
	}
	if _, err := modifiers(mods, "sync", "aligned"); err != nil || len(mods) == 0 || len(in.args) < 1 || len(in.args) > 2 {
		return errUnknown
	}
	in.run = func(w *warp, lanes uint32) error {
		l := bits.TrailingZeros32(lanes)
		id, count := int(in.args[0].get(w, l)), w.block.threads
		if len(in.args) == 2 {
			count = int(in.args[1].get(w, l))
		}
		return w.barrier(id, count, lanes)
	}
	return nil
}

// cpAsync: cp.async.{cg,ca}.shared.global [dst], [src], size[, bytes]; commit_group; wait_group n; wait_all.
func cpAsync(in *instr, mods []string, t string) error {
	if len(mods) < 2 || mods[0] != "async" {
		return errUnknown
	}
	if mods[1] == "bulk" {
		return bulkTensor(in)
	}
	if mods[1] != "ca" && mods[1] != "cg" && (len(mods) != 2 || t != "") {
		return errUnknown
	}
	switch mods[1] {
	case "commit_group":
		in.run = each(func(w *warp, l int) error {
			w.groups[l] = append(w.groups[l], w.issued[l])
			w.issued[l] = nil
			return nil
		})
		return in.want(0)
	case "wait_group", "wait_all":
		if n := len(in.args); mods[1] == "wait_all" && n != 0 || mods[1] == "wait_group" && (n != 1 || in.args[0].kind != immediate) {
			return errUnknown
		}
		in.run = each(func(w *warp, l int) error {
			keep := 0
			if mods[1] == "wait_all" {
				w.groups[l] = append(w.groups[l], w.issued[l])
				w.issued[l] = nil
			} else {
				keep = int(in.args[0].value)
			}
			for len(w.groups[l]) > keep {
				for _, c := range w.groups[l][0] {
					if err := w.copy(c, l); err != nil {
						return err
					}
				}
				w.groups[l] = w.groups[l][1:]
			}
			return nil
		})
		return nil
	}
	if m, err := modifiers(mods[1:], "cg", "ca", "shared", "global", "L2::128B"); err != nil || !m["shared"] || !m["global"] || len(in.args) < 3 {
		return errUnknown
	}
	in.run = each(func(w *warp, l int) error {
		c := copyAsync{dst: in.args[0].get(w, l), src: in.args[1].get(w, l), size: int(in.args[2].value)}
		c.bytes = c.size
		if len(in.args) == 4 {
			c.bytes = int(int32(in.args[3].get(w, l)))
		}
		if c.size != 4 && c.size != 8 && c.size != 16 || c.bytes < 0 || c.bytes > c.size {
			return fmt.Errorf("%d of %d bytes", c.bytes, c.size)
		}
		if c.src%uint64(c.size) != 0 {
			return fmt.Errorf("source %#x is no multiple of %d", c.src, c.size)
		}
		b, err := w.at("shared", c.dst, c.size, c.size, l)
		if err != nil {
			return err
		}
		copy(b, w.block.grid.poison(c.size)) // until the wait
		if c.bytes > 0 {
			if _, err := w.at("", c.src, c.bytes, 1, l); err != nil {
				return err
			}
		}
		w.issued[l] = append(w.issued[l], c)
		return nil
	})
	return nil
}

func (w *warp) copy(c copyAsync, lane int) error {
	dst, err := w.at("shared", c.dst, c.size, c.size, lane)
	if err != nil {
		return err
	}
	clear(dst)
	if c.bytes > 0 {
		src, err := w.at("", c.src, c.bytes, 1, lane)
		if err != nil {
			return err
		}
		copy(dst, src)
	}
	return w.wrote("shared", c.dst, c.size, lane)
}

// ldmatrix: lane l gives row l%8 of matrix l/8; lane l receives elements 2(l%4), +1 of row l/4, with trans of column l/4.
func ldmatrix(in *instr, mods []string, t string) error {
	m, err := modifiers(mods, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
	if err != nil || t != "b16" || len(in.args) != 2 || !m["sync"] || !m["m8n8"] {
		return errUnknown
	}
	d := vectorOf(in.args[0])
	n := map[bool]int{m["x1"]: 1, m["x2"]: 2, m["x4"]: 4}[true]
	if len(d) != n {
		return fmt.Errorf("%d registers for %d matrices", len(d), n)
	}
	in.together(nil, func(w *warp, _ uint32) error {
		var rows [32][]byte
		for l := range 8 * n {
			row, err := w.at("shared", in.args[1].get(w, l), 16, 16, l)
			if err != nil {
				return fmt.Errorf("lane %d: %w", l, err)
			}
			rows[l] = row
		}
		element := func(i, r, c int) uint64 { return load(rows[8*i+r][2*c : 2*c+2]) }
		for l := range 32 {
			for i := range n {
				g, c := l/4, 2*(l%4)
				v := element(i, g, c) | element(i, g, c+1)<<16
				if m["trans"] {
					v = element(i, c, g) | element(i, c+1, g)<<16
				}
				w.regs[d[i].reg*32+l] = v
			}
		}
		return nil
	})
	return nil
}

// mma: d = a·b + c of m16n8k16 or m16n8k8, bf16 with f32 accumulators. With g = l/4, t = l%4 lane l holds of a, two columns to a
// register, rows g and g+8 at columns 2t, then the same at 2t+8; of b rows 2t, 2t+1 and 2t+8, 2t+9 of column g; of c and d
// columns 2t, 2t+1 of row g, then of row g+8.
func mma(in *instr, mods []string, _ string) error {
	want := []string{"sync", "aligned", "", "row", "col", "f32", "bf16", "bf16"}
	if len(mods) != len(want) || in.op[len(in.op)-1] != "f32" || len(in.args) != 4 {
		return errUnknown
	}
	k := map[string]int{"m16n8k16": 16, "m16n8k8": 8}[mods[2]]
	for i := range want {
		if i != 2 && mods[i] != want[i] || k == 0 {
			return errUnknown
		}
	}
	d, a, b, c := vectorOf(in.args[0]), vectorOf(in.args[1]), vectorOf(in.args[2]), vectorOf(in.args[3])
	if len(d) != 4 || len(c) != 4 || len(a) != k/4 || len(b) != k/8 {
		return fmt.Errorf("fragments of the wrong size")
	}
	in.together(nil, func(w *warp, _ uint32) error {
		var A [16][16]float64
		var B [16][8]float64
		for l := range 32 {
			g, t := l/4, l%4
			for i := range a {
				v := a[i].get(w, l)
				for h := range 2 {
					A[g+8*(i%2)][2*t+8*(i/2)+h] = float64(f32(v >> (16 * h) & 0xffff << 16))
				}
			}
			for i := range b {
				v := b[i].get(w, l)
				for h := range 2 {
					B[2*t+8*i+h][g] = float64(f32(v >> (16 * h) & 0xffff << 16))
				}
			}
		}
		for l := range 32 {
			var out [4]uint64
			for i := range 4 {
				row, col, sum := l/4+8*(i/2), 2*(l%4)+i%2, 0.0
				for j := range k {
					sum += A[row][j] * B[j][col]
				}
				out[i] = b32(float32(sum + float64(f32(c[i].get(w, l)))))
			}
			for i := range 4 {
				w.regs[d[i].reg*32+l] = out[i]
			}
		}
		return nil
	})
	return nil
}

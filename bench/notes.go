package bench

import (
	"fmt"
	"slices"
	"strings"
)

// notes are what a reader must know beside the numbers.
func (rep *Report) notes() []string {
	var out []string
	seen := map[string]bool{}
	add := func(s string) {
		if s != "" && !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	if rep.Incomplete != "" {
		add("not everything was run: " + rep.Incomplete)
	}
	for _, s := range rep.Notes {
		add(s)
	}
	for i := range rep.Rows {
		r := &rep.Rows[i]
		switch {
		case r.MemoryBytes > 0 && r.DeviceMemory:
			add("memory is the most that margo held on the device during the case, weights included, the driver's own not")
		case r.MemoryBytes > 0:
			add("memory is the most that the process had resident during the case, program and weights included")
		}
		if r.RandomWeight {
			add("weights are random: speed is that of trained ones, pictures are not")
		}
		if r.Subset > 0 && r.Subset < r.Iters {
			what := "iterations were run (all head steps of each)"
			if r.Kind == KindDiT {
				what = "steps of a DiT were run"
			}
			add(fmt.Sprintf("%d of %d %s, the same on every side, and scaled to the whole", r.Subset, r.Iters, what))
		}
		add(r.Note)
	}
	if rep.any((*Row).Joules) {
		add("energy is what the counters of the device, or of the processor's packages, counted during a run, everything on the machine included")
	}
	for _, s := range rep.unequal() {
		add(s)
	}
	add("peak share counts the FLOPs of the authors' algorithm for every side")
	if rep.any((*Row).ShareThen) {
		add("\"of peak then\" divides by what multiply-adds did just before and after each run, on average, and between margo's iterations: a shared machine is not always at its best")
	}
	return out
}

// unequal says what differs between the models of a report beside their speed, so
// that nobody takes the table for a comparison at equal quality.
func (rep *Report) unequal() []string {
	var out []string
	values := func(of func(*Row) string) []string {
		var v []string
		for i := range rep.Rows {
			r := &rep.Rows[i]
			if s := of(r); r.Part == "sample" && s != "" && !slices.Contains(v, s) {
				v = append(v, s)
			}
		}
		return v
	}
	models := values(func(r *Row) string { return r.Model })
	kinds := values(func(r *Row) string { return r.Kind })
	if guided := values(func(r *Row) string {
		if r.Kind == KindDiT && r.CFG != 1 {
			return r.Guided
		}
		return ""
	}); len(guided) > 0 {
		which := map[string]string{"3": "three of the latent channels, as in its authors' code; the fourth is not guided", "all": "all latent channels, as in diffusers; its authors' code guides three"}
		for _, g := range guided {
			out = append(out, "a DiT's guidance covers "+which[g])
		}
	}
	if len(models) < 2 {
		return out
	}
	out = append(out, "unequal: the models differ in the quality of their images; these are speeds at the settings shown, not at equal FID")
	if v := values(func(r *Row) string { return fmt.Sprintf("%d×%d", r.Pixels, r.Pixels) }); len(v) > 1 {
		out = append(out, "unequal: images have "+strings.Join(v, " and ")+" pixels")
	}
	if slices.Contains(kinds, KindDiT) && len(kinds) > 1 {
		s := "unequal: a DiT works on the 32×32×4 latents of KL-8, MAR and AR on the 16×16×16 ones of KL-16"
		if rep.Decoded {
			s += "; each is decoded by its own"
		} else {
			s += "; decoding is not included"
		}
		out = append(out, s)
	}
	if v := values(func(r *Row) string {
		if r.CFG == 1 {
			return "off"
		}
		return "on"
	}); len(v) > 1 {
		out = append(out, "unequal: some cases have guidance, which doubles the work, and some have none")
	}
	if slices.Contains(kinds, KindAR) {
		out = append(out, "nobody has published weights of the causal models; they are the paper's controls of its Table 1")
	}
	if !rep.Interleaved {
		out = append(out, "the sides of a case took turns, the cases ran one after the other: a machine that changes its speed meanwhile favours some")
	}
	return out
}

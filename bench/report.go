package bench

import (
	"bufio"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strings"
	"text/tabwriter"
	"time"
)

// Kinds of model that are compared.
const (
	KindMAR       = "mar"       // masked or one by one, bidirectional
	KindAR        = "ar"        // causal, with a KV cache
	KindDiT       = "dit"       // joint diffusion
	KindTokenizer = "tokenizer" // alone
)

// Case is a piece of work that several sides do.
type Case struct {
	Model     string  `json:"model"`
	Kind      string  `json:"kind"`
	DType     string  `json:"dtype"`
	Batch     int     `json:"batch"`
	Iters     int     `json:"iters"`                  // autoregressive iterations; of a DiT its reverse steps
	HeadSteps int     `json:"head_steps"`             // diffusion steps for each token; 0 of a DiT
	Steps     string  `json:"steps,omitempty"`        // of a DiT: the respacing
	Sampler   string  `json:"sampler,omitempty"`      // of a DiT
	Guided    string  `json:"cfg_channels,omitempty"` // of a DiT: what its guidance covers
	CFG       float64 `json:"cfg"`
	Pixels    int     `json:"pixels"` // height and width of an image
	Part      string  `json:"part"`   // "sample", or "decode" for the tokenizer alone
	Subset    int     `json:"subset"`
}

// Settings says in a word how much is done for an image: "64×100" iterations and
// diffusion steps of the head, "250 ddpm" steps.
func (c Case) Settings() string {
	switch {
	case c.Part == "decode":
		return "decode"
	case c.Kind == KindDiT:
		return c.Steps + " " + c.Sampler
	case c.HeadSteps == 0:
		return fmt.Sprint(c.Iters)
	}
	return fmt.Sprintf("%d×%d", c.Iters, c.HeadSteps)
}

// Label names a case in a line of text.
func (c Case) Label() string {
	return fmt.Sprintf("%s %s %s batch %d", c.Model, c.Settings(), c.DType, c.Batch)
}

// Run is one repetition: seconds for the whole batch, by part. Where only a
// subset of the iterations was run, seconds are scaled by the strata's weights.
type Run struct {
	Seconds float64            `json:"seconds"`
	Parts   map[string]float64 `json:"parts"`
	Joules  float64            `json:"joules,omitempty"` // of the whole batch; 0: the machine does not tell
	// PeakThen is the mean arithmetic that the machine gave just before and after, and to
	// margo between iterations, in FLOP/s and the case's dtype; 0: not known.
	PeakThen float64 `json:"peak_then_flops,omitempty"`
}

// Row is what one side achieved on one case.
type Row struct {
	Case
	Side         string  `json:"side"`
	Runs         []Run   `json:"runs"`
	FLOPs        float64 `json:"flops_authors"` // of the authors' algorithm, whole batch
	OwnFLOPs     float64 `json:"flops_own"`     // really executed; 0: not known
	Peak         float64 `json:"peak_flops"`    // of the machine, in the case's dtype
	MemoryBytes  int64   `json:"memory_bytes"`  // most that the process had resident during the case, or held on its device; 0: not known
	DeviceMemory bool    `json:"device_memory"` // MemoryBytes is of a device with memory of its own
	RandomWeight bool    `json:"random_weights"`
	Note         string  `json:"note,omitempty"`
	// Machine is that of the run, if it is not the report's.
	Machine *Machine `json:"machine,omitempty"`
}

func (r *Row) seconds() []float64 {
	v := make([]float64, len(r.Runs))
	for i, run := range r.Runs {
		v[i] = run.Seconds
	}
	return v
}

// Seconds is the median time of the batch.
func (r *Row) Seconds() float64 { return Median(r.seconds()) }

// ImagesPerSecond is the throughput.
func (r *Row) ImagesPerSecond() float64 { return float64(r.Batch) / r.Seconds() }

// PeakShare is FLOPs/Seconds over the measured peak.
func (r *Row) PeakShare() float64 { return r.FLOPs / r.Seconds() / r.Peak }

// ShareThen is the median over the runs of FLOPs/Seconds over the arithmetic that the
// machine gave beside the run; NaN: not known. On a machine that others use too it tells
// what is the program's share of a loss.
func (r *Row) ShareThen() float64 {
	var v []float64
	for _, run := range r.Runs {
		if run.PeakThen > 0 {
			v = append(v, r.FLOPs/run.Seconds/run.PeakThen)
		}
	}
	return Median(v)
}

// PartSeconds is the median time of a part.
func (r *Row) PartSeconds(part string) float64 {
	var v []float64
	for _, run := range r.Runs {
		v = append(v, run.Parts[part])
	}
	return Median(v)
}

// Joules is the median energy of the batch; 0: not known.
func (r *Row) Joules() float64 {
	v := make([]float64, len(r.Runs))
	for i, run := range r.Runs {
		v[i] = run.Joules
	}
	return Median(v)
}

// Report is a whole benchmark.
type Report struct {
	Machine    Machine `json:"machine"`
	Rows       []Row   `json:"rows"`
	Incomplete string  `json:"incomplete,omitempty"` // why cases are missing
	// Decoded: images were decoded too; else times are of latents.
	Decoded     bool `json:"decoded"`
	Interleaved bool `json:"interleaved"` // all cases took turns, not only the sides of one
	// Notes are what else a reader must know.
	Notes []string `json:"notes,omitempty"`
}

// Add appends the rows of another report and notes where they come from, if not from
// the same run.
func (rep *Report) Add(other *Report) {
	a, b := rep.Machine, other.Machine
	same := a.run() == b.run()
	for _, r := range other.Rows {
		if r.Machine == nil && !same {
			r.Machine = &b
		}
		rep.Rows = append(rep.Rows, r)
	}
	rep.Interleaved = false
	rep.Decoded = rep.Decoded || other.Decoded
	if !same {
		rep.Notes = append(rep.Notes, fmt.Sprintf("some rows are of another run: %s, device %s, commit %s, %s: %s", b.CPU, b.Device, b.Commit, b.Time.Format("2006-01-02 15:04 MST"), b.Command))
	}
	rep.Notes = append(rep.Notes, other.Notes...)
	if rep.Incomplete == "" {
		rep.Incomplete = other.Incomplete
	}
}

// run tells runs apart.
func (m *Machine) run() string {
	return fmt.Sprintf("%q %s %q %q %s", m.Command, m.Time.UTC().Format(time.RFC3339), m.CPU, m.Device, m.Commit)
}

// machine is where a row was measured.
func (rep *Report) machine(r *Row) *Machine {
	if r.Machine != nil {
		return r.Machine
	}
	return &rep.Machine
}

var parts = []string{"encoder", "decoder", "head", "denoiser", "tokenizer", "other"}

// shown are the parts that any row spent time in.
func (rep *Report) shown() []string {
	var out []string
	for _, p := range parts {
		for i := range rep.Rows {
			if rep.Rows[i].PartSeconds(p) > 0 {
				out = append(out, p)
				break
			}
		}
	}
	return out
}

// any reports whether a figure is known of some row.
func (rep *Report) any(of func(*Row) float64) bool {
	for i := range rep.Rows {
		if of(&rep.Rows[i]) > 0 {
			return true
		}
	}
	return false
}

// Formats lists the names that Write knows.
var Formats = []string{"table", "csv", "json", "benchstat"}

// Write prints the report in one of Formats.
func (rep *Report) Write(to io.Writer, format string) error {
	w := bufio.NewWriter(to) // remembers the first error
	var err error
	switch format {
	case "table":
		err = rep.table(w)
	case "csv":
		err = rep.csv(w)
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		err = enc.Encode(rep)
	case "benchstat":
		rep.benchstat(w)
	default:
		return fmt.Errorf("format %q is not one of %s", format, strings.Join(Formats, ", "))
	}
	if err != nil {
		return err
	}
	return w.Flush()
}

func (rep *Report) header(w io.Writer) {
	m := rep.Machine
	fmt.Fprintf(w, "%s, %d cores, %s, kernel %s, %s, commit %s, %s\n", m.CPU, m.Cores, m.OS, m.Kernel, m.Go, m.Commit, m.Time.Format("2006-01-02 15:04 MST"))
	peak := "measured peak"
	if m.PeaksDerived {
		peak = "peak by its clocks and units"
	}
	fmt.Fprintf(w, "device %s: %s %.0f GFLOP/s f32, %.0f GFLOP/s bf16, reads %.0f GB/s\n", m.Device, peak, m.PeakF32/1e9, m.PeakB16/1e9, m.ReadBW/1e9)
	for _, h := range m.Health {
		fmt.Fprintf(w, "%s\n", h)
	}
	fmt.Fprintf(w, "command: %s\n", m.Command)
}

func (rep *Report) table(w io.Writer) error {
	rep.header(w)
	fmt.Fprintln(w)
	shown, energy, then := rep.shown(), rep.any((*Row).Joules), rep.any((*Row).ShareThen)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "model\twork\tdtype\tbatch\tside\truns\ts/image\timages/s\tspread\tpeak share")
	if then {
		fmt.Fprint(tw, "\tof peak then")
	}
	fmt.Fprint(tw, "\tTFLOP/img\town TFLOP")
	for _, p := range shown {
		fmt.Fprintf(tw, "\t%s s", p)
	}
	if energy {
		fmt.Fprint(tw, "\tJ/image")
	}
	fmt.Fprintln(tw, "\tmemory MiB\t")
	for i := range rep.Rows {
		r := &rep.Rows[i]
		n := float64(r.Batch)
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t%d\t%.4g\t%.4g\t%s\t%s", r.Model, r.Settings(), r.DType, r.Batch, r.Side, len(r.Runs),
			r.Seconds()/n, r.ImagesPerSecond(), percent(Spread(r.seconds())), percent(r.PeakShare()))
		if then {
			fmt.Fprintf(tw, "\t%s", percent(r.ShareThen()))
		}
		fmt.Fprintf(tw, "\t%.3g\t%s", r.FLOPs/n/1e12, dash(r.OwnFLOPs/n/1e12))
		for _, p := range shown {
			fmt.Fprintf(tw, "\t%s", dash(r.PartSeconds(p)/n))
		}
		if energy {
			fmt.Fprintf(tw, "\t%s", dash(r.Joules()/n))
		}
		fmt.Fprintf(tw, "\t%s\t\n", dash(float64(r.MemoryBytes)/(1<<20)))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, line := range rep.ratios() {
		fmt.Fprintln(w, line)
	}
	for _, note := range rep.notes() {
		fmt.Fprintln(w, "note: "+note)
	}
	return nil
}

func dash(v float64) string {
	if v == 0 || finite(v) == nil {
		return "-"
	}
	return fmt.Sprintf("%.3g", v)
}

func percent(v float64) string {
	if finite(v) == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", 100*v)
}

// ratios says how much faster margo was than each other side of the same case.
// Sides ran interleaved, so the ratio is taken run by run, of one report.
func (rep *Report) ratios() []string {
	type key struct {
		Case
		run string
	}
	base := map[key]*Row{}
	for i := range rep.Rows {
		if r := &rep.Rows[i]; r.Side == "margo" {
			base[key{r.Case, rep.machine(r).run()}] = r
		}
	}
	var out []string
	for i := range rep.Rows {
		r := &rep.Rows[i]
		b := base[key{r.Case, rep.machine(r).run()}]
		if b == nil || b.Side == r.Side {
			continue
		}
		var q []float64
		for j := 0; j < min(len(r.Runs), len(b.Runs)); j++ {
			if ratio := r.Runs[j].Seconds / b.Runs[j].Seconds; finite(ratio) != nil {
				q = append(q, ratio)
			}
		}
		sort.Float64s(q)
		if len(q) > 0 {
			out = append(out, fmt.Sprintf("%s: margo is %.2f times as fast as %s (%d pairs, %.2f to %.2f)",
				r.Label(), Median(q), r.Side, len(q), q[0], q[len(q)-1]))
		}
	}
	return out
}

func (rep *Report) csv(w io.Writer) error {
	c := csv.NewWriter(w)
	head := []string{"model", "kind", "part", "dtype", "batch", "iters", "head_steps", "steps", "sampler", "cfg_channels", "cfg", "pixels", "subset", "side", "runs", "seconds_per_image", "images_per_s", "spread", "peak_share", "peak_share_then", "flops_authors", "flops_own", "memory_bytes", "joules_per_image"}
	for _, p := range parts {
		head = append(head, p+"_s")
	}
	head = append(head, "cpu", "commit", "command")
	if err := c.Write(head); err != nil {
		return err
	}
	for i := range rep.Rows {
		r := &rep.Rows[i]
		f := func(v float64) string {
			if finite(v) == nil {
				return ""
			}
			return fmt.Sprintf("%.6g", v)
		}
		memory := ""
		if r.MemoryBytes > 0 {
			memory = fmt.Sprint(r.MemoryBytes)
		}
		joules := ""
		if j := r.Joules(); j > 0 {
			joules = f(j / float64(r.Batch))
		}
		rec := []string{r.Model, r.Kind, r.Part, r.DType, fmt.Sprint(r.Batch), fmt.Sprint(r.Iters), fmt.Sprint(r.HeadSteps), r.Steps, r.Sampler, r.Guided,
			f(r.CFG), fmt.Sprint(r.Pixels), fmt.Sprint(r.Subset), r.Side, fmt.Sprint(len(r.Runs)),
			f(r.Seconds() / float64(r.Batch)), f(r.ImagesPerSecond()), f(Spread(r.seconds())), f(r.PeakShare()), f(r.ShareThen()), f(r.FLOPs), f(r.OwnFLOPs), memory, joules}
		for _, p := range parts {
			rec = append(rec, f(r.PartSeconds(p)/float64(r.Batch)))
		}
		m := rep.machine(r)
		if err := c.Write(append(rec, m.CPU, m.Commit, m.Command)); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

// benchstat prints one line per run in the format of `go test -bench`, which
// the benchstat tool compares. A figure that is not finite is left out.
func (rep *Report) benchstat(w io.Writer) {
	last := ""
	for i := range rep.Rows {
		r := &rep.Rows[i]
		if m := rep.machine(r); m.run() != last { // holds for the lines that follow
			last = m.run()
			fmt.Fprintf(w, "goos: %s\ncpu: %s\ncommit: %s\n", strings.ReplaceAll(m.OS, "/", "\ngoarch: "), m.CPU, m.Commit)
		}
		// A slash separates names, and dit-xl/2 has one.
		model := strings.ReplaceAll(r.Model, "/", "-")
		work := fmt.Sprintf("iters=%d/steps=%d", r.Iters, r.HeadSteps)
		if r.Kind == KindDiT {
			work = fmt.Sprintf("steps=%s/sampler=%s", r.Steps, r.Sampler)
		}
		name := fmt.Sprintf("Benchmark%s/model=%s/dtype=%s/batch=%d/%s/cfg=%g/side=%s", strings.ToUpper(r.Part[:1])+r.Part[1:],
			model, r.DType, r.Batch, work, r.CFG, strings.ReplaceAll(r.Side, " ", "-"))
		for _, run := range r.Runs {
			if finite(run.Seconds) == nil {
				continue
			}
			fmt.Fprintf(w, "%s 1 %.0f ns/op", name, run.Seconds*1e9)
			if v := float64(r.Batch) / run.Seconds; finite(v) != nil {
				fmt.Fprintf(w, " %.6g img/s", v)
			}
			if v := r.FLOPs / run.Seconds / r.Peak; finite(v) != nil {
				fmt.Fprintf(w, " %.4g peak-share", v)
			}
			fmt.Fprintln(w)
		}
	}
}

package bench

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"math"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/checkpoint"
)

func TestMedianAndSpread(t *testing.T) {
	if m := Median([]float64{3, 1, 2}); m != 2 {
		t.Errorf("median of three: %g", m)
	}
	if m := Median([]float64{4, 1, 2, 3}); m != 2.5 {
		t.Errorf("median of four: %g", m)
	}
	if s := Spread([]float64{1, 2, 3}); s != 1 {
		t.Errorf("spread: %g", s)
	}
	if !math.IsNaN(Median(nil)) {
		t.Error("median of nothing is a number")
	}
}

func TestStrataCoverEveryIterationOnce(t *testing.T) {
	for _, c := range [][2]int{{64, 8}, {64, 64}, {64, 0}, {24, 7}, {1, 8}, {5, 5}} {
		total, last := 0, -1
		for _, s := range Strata(c[0], c[1]) {
			if s.Iteration <= last || s.Iteration >= c[0] || s.Weight < 1 {
				t.Errorf("strata %v: %+v after %d", c, s, last)
			}
			last = s.Iteration
			total += s.Weight
		}
		if total != c[0] {
			t.Errorf("strata %v stand for %d iterations", c, total)
		}
	}
}

func report() *Report {
	c := Case{Model: "m", Kind: KindMAR, DType: "f32", Batch: 4, Iters: 64, HeadSteps: 100, CFG: 3, Part: "sample", Subset: 8}
	return &Report{Machine: ThisMachine(), Rows: []Row{
		{Case: c, Side: "margo", FLOPs: 8e12, OwnFLOPs: 7e12, Peak: 1e12, RandomWeight: true,
			Runs: []Run{{Seconds: 10, PeakThen: 1e12, Parts: map[string]float64{"head": 4}}, {Seconds: 12, PeakThen: 8e11, Parts: map[string]float64{"head": 6}}, {Seconds: 11, Parts: map[string]float64{"head": 5}}}},
		{Case: c, Side: "pytorch eager", FLOPs: 8e12, Peak: 1e12, Runs: []Run{{Seconds: 20}, {Seconds: 36}, {Seconds: 33}}},
	}}
}

func TestFormats(t *testing.T) {
	for _, f := range Formats {
		var b bytes.Buffer
		if err := report().Write(&b, f); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		s := b.String()
		switch f {
		case "table":
			for _, want := range []string{"m 64×100 f32 batch 4: margo is 3.00 times as fast as pytorch eager (3 pairs, 2.00 to 3.00)", "73%", "of peak then", "82%", "8 of 64 iterations", "weights are random"} {
				if !strings.Contains(s, want) {
					t.Errorf("table lacks %q:\n%s", want, s)
				}
			}
		case "csv":
			rec, err := csv.NewReader(&b).ReadAll()
			if err != nil || len(rec) != 3 || rec[1][15] != "2.75" || rec[1][19] != "0.816667" || rec[2][19] != "" {
				t.Errorf("csv: %v %v", rec, err)
			}
		case "json":
			var back Report
			if err := json.Unmarshal(b.Bytes(), &back); err != nil || back.Rows[0].Runs[1].Seconds != 12 || back.Rows[0].Runs[1].PeakThen != 8e11 || !strings.Contains(s, `"peak_share_then": 0.8166`) {
				t.Errorf("json: %v", err)
			}
		case "benchstat":
			if n := strings.Count(s, "\nBenchmarkSample/model=m/dtype=f32/batch=4"); n != 6 {
				t.Errorf("benchstat: %d lines in\n%s", n, s)
			}
		}
	}
	if err := report().Write(&bytes.Buffer{}, "xml"); err == nil {
		t.Error("unknown format accepted")
	}
}

// A shell script stands for the peer: the protocol is lines of JSON.
func TestPeer(t *testing.T) {
	if _, err := exec.LookPath("sh"); err != nil {
		t.Fatal(err)
	}
	script := `while read -r line; do case "$line" in
	*boom*) echo '{"error":"no such model"}';;
	*die*) echo "last words" >&2; exit 3;;
	*hang*) sleep 60;;
	*nan*) echo '{"seconds_total": NaN, "v": [-Infinity, Infinity], "x": 2}';;
	*) echo '{"seconds_total": 1.5}';; esac; done`
	start := func() *Peer {
		p, err := StartPeer("sh", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	var got struct {
		S float64 `json:"seconds_total"`
	}
	if err := p.Call(t.Context(), map[string]any{"cmd": "run"}, &got, time.Minute); err != nil || got.S != 1.5 {
		t.Fatalf("%v %v", got, err)
	}
	var odd struct {
		S *float64   `json:"seconds_total"`
		V []*float64 `json:"v"`
		X float64    `json:"x"`
	}
	if err := p.Call(t.Context(), map[string]any{"cmd": "nan"}, &odd, time.Minute); err != nil || odd.S != nil || len(odd.V) != 2 || odd.X != 2 {
		t.Errorf("NaN in an answer: %+v, %v", odd, err)
	}
	if err := p.Call(t.Context(), map[string]any{"cmd": "boom"}, nil, time.Minute); err == nil || !strings.Contains(err.Error(), "no such model") {
		t.Errorf("error answer: %v", err)
	}
	if err := p.Call(t.Context(), map[string]any{"cmd": "die"}, nil, time.Minute); err == nil || !strings.Contains(err.Error(), "last words") {
		t.Errorf("dead peer: %v", err)
	}
	p = start()
	if err := p.Call(t.Context(), map[string]any{"cmd": "hang"}, nil, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("hanging peer: %v", err)
	}
	// The end of the context ends the process and its children: the answer's
	// end is read only when the sleep is gone too.
	begin := time.Now()
	p = start()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := p.Call(ctx, map[string]any{"cmd": "hang"}, nil, time.Minute); !errors.Is(err, engine.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := p.Close(); err == nil {
		t.Error("a process that was killed closed well")
	}
	// So does the program's end at once.
	p = start()
	time.AfterFunc(50*time.Millisecond, KillPeers)
	if err := p.Call(t.Context(), map[string]any{"cmd": "hang"}, nil, time.Minute); err == nil {
		t.Errorf("killed: %v", err)
	}
	if d := time.Since(begin); d > 30*time.Second {
		t.Errorf("the processes ended after %v", d)
	}
	p = start()
	if err := p.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := StartPeer(os.DevNull + "/nothing"); err == nil {
		t.Error("started nothing")
	}
}

// No number can break a format.
func TestNotFinite(t *testing.T) {
	r := report()
	r.Incomplete = "interrupted"
	row := &r.Rows[0]
	row.CFG, row.Peak, row.FLOPs = math.Inf(1), 0, math.NaN()
	row.Runs[0] = Run{math.NaN(), map[string]float64{"head": math.Inf(-1)}, math.NaN(), math.NaN()}
	row.Runs[1].Seconds = 0
	r.Machine.ReadBW = math.Inf(1)
	for _, f := range Formats {
		var b bytes.Buffer
		if err := r.Write(&b, f); err != nil {
			t.Errorf("%s: %v", f, err)
		}
		if f == "json" {
			var m struct {
				Incomplete string
				Machine    map[string]any
				Rows       []map[string]any
			}
			if err := json.Unmarshal(b.Bytes(), &m); err != nil {
				t.Fatalf("%v in %s", err, b.String())
			}
			for _, name := range []string{"cfg", "flops_authors", "peak_share"} {
				if v, ok := m.Rows[0][name]; !ok || v != nil {
					t.Errorf("%s is %v, %v", name, v, ok)
				}
			}
			if m.Rows[1]["images_per_s"] != 4./33 || m.Rows[1]["cfg"] != 3. || m.Machine["read_bytes_per_s"] != nil || m.Incomplete == "" {
				t.Errorf("%v", m)
			}
		} else if s := strings.ToLower(strings.ReplaceAll(b.String(), "cfg=+Inf", "")); f == "benchstat" && (strings.Contains(s, "nan") || strings.Contains(s, "inf")) {
			t.Errorf("%s: %s", f, s)
		}
	}
}

// A later case does not show the peak of an earlier one.
func TestPeakMemory(t *testing.T) {
	pid := os.Getpid()
	if !resetPeak(pid) {
		t.Skip("the system does not forget peaks")
	}
	before := peakResident(pid)
	b := make([]byte, 64<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	with := peakResident(pid)
	runtime.KeepAlive(b)
	b = nil
	debug.FreeOSMemory()
	kept := peakResident(pid)
	resetPeak(pid)
	after := peakResident(pid)
	if with-before < 60<<20 || kept < with-4<<20 || with-after < 50<<20 {
		t.Errorf("MiB: %d, with 64 more %d, without them %d, forgotten %d", before>>20, with>>20, kept>>20, after>>20)
	}
	if resetPeak(-1) || peakResident(-1) != 0 {
		t.Error("a process that is not there has memory")
	}
}

// 250.1 GFLOP in convolutions and attention; normalisation and activations add
// little.
func TestDecodeFLOPs(t *testing.T) {
	f, err := DecodeFLOPs(checkpoint.KL16(), 16, 16)
	if err != nil || math.Abs(f/250.1e9-1) > 0.02 {
		t.Errorf("KL-16 decodes 256×256 with %.4g GFLOP, %v", f/1e9, err)
	}
}

// counting is a device that counts its own memory.
type counting struct {
	engine.Device
	peak int64
}

func (c *counting) PeakUsed() int64 { return c.peak }
func (c *counting) ResetPeakUsed()  { c.peak = 100 }

// Memory is the device's where that has its own; what a peer holds there is not known.
func TestDeviceMemory(t *testing.T) {
	d := &counting{peak: 5000}
	m := meter(&Margo{Device: d})
	if m.reset(); d.peak != 100 {
		t.Error("the peak of an earlier case was not forgotten")
	}
	d.peak = 700
	if n, device := m.peak(); n != 700 || !device {
		t.Errorf("the device's peak is %d (%v), want 700", n, device)
	}
	m = meter(&PyTorch{away: true})
	m.reset()
	if n, device := m.peak(); n != 0 || !device {
		t.Errorf("a peer's peak on a GPU is %d (%v), want unknown", n, device)
	}
	m = meter(&Margo{Device: struct{ engine.Device }{}})
	if n, device := m.peak(); n != 0 || device {
		t.Errorf("before a reset the peak is %d (%v), want unknown", n, device)
	}
	m.reset()
	if n, device := m.peak(); device || resetPeak(os.Getpid()) && n < 1<<20 {
		t.Errorf("the process's peak is %d (%v)", n, device)
	}
}

package bench

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

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
	c := Case{Model: "m", DType: "f32", Batch: 4, Iters: 64, HeadSteps: 100, CFG: 3, Part: "sample", Subset: 8}
	return &Report{Machine: ThisMachine(), Rows: []Row{
		{Case: c, Side: "margo", FLOPs: 8e12, OwnFLOPs: 7e12, Peak: 1e12, RandomWeight: true,
			Runs: []Run{{10, map[string]float64{"head": 4}}, {12, map[string]float64{"head": 6}}, {11, map[string]float64{"head": 5}}}},
		{Case: c, Side: "pytorch eager", FLOPs: 8e12, Peak: 1e12, Runs: []Run{{20, nil}, {36, nil}, {33, nil}}},
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
			for _, want := range []string{"margo is 3.00 times as fast as pytorch eager (3 pairs, 2.00 to 3.00)", "73%", "8 of 64 iterations", "weights are random"} {
				if !strings.Contains(s, want) {
					t.Errorf("table lacks %q:\n%s", want, s)
				}
			}
		case "csv":
			rec, err := csv.NewReader(&b).ReadAll()
			if err != nil || len(rec) != 3 || rec[1][10] != "2.75" {
				t.Errorf("csv: %v %v", rec, err)
			}
		case "json":
			var back Report
			if err := json.Unmarshal(b.Bytes(), &back); err != nil || back.Rows[0].Runs[1].Seconds != 12 {
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
	if err := p.Call(map[string]any{"cmd": "run"}, &got, time.Minute); err != nil || got.S != 1.5 {
		t.Fatalf("%v %v", got, err)
	}
	if err := p.Call(map[string]any{"cmd": "boom"}, nil, time.Minute); err == nil || !strings.Contains(err.Error(), "no such model") {
		t.Errorf("error answer: %v", err)
	}
	if err := p.Call(map[string]any{"cmd": "die"}, nil, time.Minute); err == nil || !strings.Contains(err.Error(), "last words") {
		t.Errorf("dead peer: %v", err)
	}
	p = start()
	if err := p.Call(map[string]any{"cmd": "hang"}, nil, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no answer") {
		t.Errorf("hanging peer: %v", err)
	}
	p = start()
	if err := p.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := StartPeer(os.DevNull + "/nothing"); err == nil {
		t.Error("started nothing")
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

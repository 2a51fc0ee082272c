package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// rivals is a report of three kinds of model, one at two settings.
func rivals() *Report {
	row := func(c Case, flops, seconds float64, side string) Row {
		c.DType, c.Batch, c.CFG, c.Pixels, c.Part = "f32", 1, 3, 256, "sample"
		part := "head"
		if c.Kind == KindDiT {
			part = "denoiser"
		}
		return Row{Case: c, Side: side, FLOPs: flops, Peak: 1e11, Runs: []Run{{Seconds: seconds, Parts: map[string]float64{part: seconds / 2}, Joules: 30 * seconds}}}
	}
	mar := Case{Model: "mar-base", Kind: KindMAR, Iters: 64, HeadSteps: 100}
	few := mar
	few.HeadSteps = 25
	joint := Case{Model: "dit-xl/2", Kind: KindDiT, Iters: 50, Steps: "50", Sampler: "ddpm", Guided: "3"}
	return &Report{Machine: ThisMachine(), Rows: []Row{
		row(mar, 14.6e12, 180, "margo"), row(few, 12e12, 150, "margo"), row(mar, 14.6e12, 400, "pytorch eager"),
		row(joint, 24e12, 300, "margo"),
		row(Case{Model: "ar-raster-base", Kind: KindAR, Iters: 256, HeadSteps: 100}, 4e12, 60, "margo"),
	}}
}

func table(t *testing.T, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.Write(&b, "table"); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// A table has the parts that were measured, energy where it is known, and whatever
// makes its models unequal.
func TestUnequal(t *testing.T) {
	s := table(t, rivals())
	for _, want := range []string{"denoiser s", "J/image", "5.4e+03", "50 ddpm", "64×25", "not at equal FID", "KL-8, MAR and AR", "decoding is not included",
		"three of the latent channels", "published weights of the causal", "one after the other"} {
		if !strings.Contains(s, want) {
			t.Errorf("no %q in\n%s", want, s)
		}
	}
	for _, absent := range []string{"of peak then", "encoder s", "tokenizer s", "unequal: images have", "unequal: some cases have guidance"} {
		if strings.Contains(s, absent) {
			t.Errorf("%q in\n%s", absent, s)
		}
	}
	r := rivals()
	r.Interleaved, r.Decoded = true, true
	r.Rows[0].Pixels, r.Rows[1].CFG, r.Rows[3].Guided = 512, 1, "all"
	s = table(t, r)
	for _, want := range []string{"512×512 and 256×256 pixels", "some cases have guidance", "each is decoded by its own", "all latent channels"} {
		if !strings.Contains(s, want) {
			t.Errorf("no %q in\n%s", want, s)
		}
	}
	if strings.Contains(s, "one after the other") {
		t.Error("an interleaved report says that its cases were not")
	}
	alone := rivals()
	alone.Rows = alone.Rows[:3]
	if s := table(t, alone); strings.Contains(s, "unequal") {
		t.Errorf("one model is unequal to itself:\n%s", s)
	}
}

// The names of benchstat have no slash but its own.
func TestBenchstatNames(t *testing.T) {
	var b bytes.Buffer
	if err := rivals().Write(&b, "benchstat"); err != nil {
		t.Fatal(err)
	}
	if want := "BenchmarkSample/model=dit-xl-2/dtype=f32/batch=1/steps=50/sampler=ddpm/cfg=3/side=margo 1 300000000000 ns/op"; !strings.Contains(b.String(), want) {
		t.Errorf("no %q in\n%s", want, b.String())
	}
}

// A report read back is the report; added to another it says where it comes from.
func TestAdd(t *testing.T) {
	var b bytes.Buffer
	if err := rivals().Write(&b, "json"); err != nil {
		t.Fatal(err)
	}
	back := &Report{}
	if err := json.Unmarshal(b.Bytes(), back); err != nil {
		t.Fatal(err)
	}
	again := rivals()
	again.Machine = back.Machine
	if a, b := table(t, back), table(t, again); a != b {
		t.Errorf("written and read back:\n%s\nwant\n%s", a, b)
	}
	other := rivals()
	other.Machine.CPU, other.Machine.Command = "Another CPU", "margo bench elsewhere"
	back.Add(other)
	if s := table(t, back); len(back.Rows) != 10 || !strings.Contains(s, "some rows are of another run: Another CPU") || !strings.Contains(s, "margo bench elsewhere") {
		t.Errorf("%d rows\n%s", len(back.Rows), s)
	}
	for _, format := range []string{"csv", "benchstat"} { // every row has its own machine
		b.Reset()
		if err := back.Write(&b, format); err != nil || strings.Count(b.String(), "Another CPU") != map[string]int{"csv": 5, "benchstat": 1}[format] {
			t.Errorf("%v\n%s", err, b.String())
		}
	}
}

// margo of one run is not compared with PyTorch of another, nor with itself.
func TestRatiosOfOneRun(t *testing.T) {
	report := func(cpu string, margo, torch float64) *Report {
		c := Case{Model: "m", Kind: KindMAR, DType: "f32", Batch: 1, Iters: 4, HeadSteps: 2, CFG: 1, Part: "sample"}
		return &Report{Machine: Machine{CPU: cpu}, Rows: []Row{
			{Case: c, Side: "margo", Runs: []Run{{Seconds: margo}}}, {Case: c, Side: "pytorch eager", Runs: []Run{{Seconds: torch}}}}}
	}
	rep := report("slow", 10, 30)
	rep.Add(report("fast", 1, 2))
	rep.Add(report("slow", 10, 30))
	var b bytes.Buffer
	if err := rep.Write(&b, "json"); err != nil {
		t.Fatal(err)
	}
	back := &Report{}
	if err := json.Unmarshal(b.Bytes(), back); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(back.ratios(), "\n")
	if strings.Count(got, "margo is 3.00 times") != 2 || strings.Count(got, "margo is 2.00 times") != 1 || strings.Count(got, "\n") != 2 {
		t.Error(got)
	}
}

func TestPlot(t *testing.T) {
	var b bytes.Buffer
	if err := rivals().Plot(&b, "png"); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil || img.Bounds().Dx() < 500 {
		t.Fatalf("%v, %v", img, err)
	}
	colours := map[[3]uint32]int{}
	for y := range img.Bounds().Dy() {
		for x := range img.Bounds().Dx() {
			r, g, b, _ := img.At(x, y).RGBA()
			colours[[3]uint32{r >> 8, g >> 8, b >> 8}]++
		}
	}
	for i := range 3 { // a line, dots and a label for each model
		r, g, b, _ := palette[i].RGBA()
		if n := colours[[3]uint32{r >> 8, g >> 8, b >> 8}]; n < 50 {
			t.Errorf("colour %d of the palette has %d pixels", i, n)
		}
	}
	b.Reset()
	if err := rivals().Plot(&b, "svg"); err != nil || !strings.Contains(b.String(), ">64×25<") || !strings.Contains(b.String(), "peak f32, 100 GFLOP/s") {
		t.Errorf("svg: %v", err)
	}
	if err := (&Report{}).Plot(&b, "png"); err == nil {
		t.Error("a plot of nothing")
	}
	if err := rivals().Plot(&b, "bmp"); err == nil {
		t.Error("a format that there is not")
	}
}

// Packages count, their parts don't; a counter that begins again goes on.
func TestRAPL(t *testing.T) {
	root := t.TempDir()
	write := func(zone, name, energy string) {
		dir := filepath.Join(root, zone)
		if err := os.MkdirAll(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		for f, s := range map[string]string{"name": name, "energy_uj": energy, "max_energy_range_uj": "5000000"} {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(s+"\n"), 0o666); err != nil {
				t.Fatal(err)
			}
		}
	}
	if e := rapl(root); e.read != nil || e.start()() != 0 {
		t.Error("energy without a counter")
	}
	write("intel-rapl:0", "package-0", "1000000")
	write("intel-rapl:1", "package-1", "4000000")
	write("intel-rapl:0:0", "core", "0")
	write("intel-rapl:2", "psys", "0")
	used := rapl(root).start()
	write("intel-rapl:0", "package-0", "3500000")
	write("intel-rapl:1", "package-1", "1000000")
	write("intel-rapl:0:0", "core", "2000000")
	if j := used(); j < 4.499 || j > 4.501 {
		t.Errorf("%g J, want 2.5 + 2", j)
	}
	write("intel-rapl:1", "package-1", "secret")
	if rapl(root).read != nil {
		t.Error("energy of half the machine")
	}
}

// turns is a side that writes down when it ran.
type turns struct {
	name string
	log  *[]string
	err  error
}

func (s turns) Name() string { return s.name }
func (s turns) PID() int     { return os.Getpid() }
func (s turns) Close() error { return nil }
func (s turns) Warm(_ context.Context, c Case) error {
	*s.log = append(*s.log, "warm "+s.name+" "+c.Model)
	return nil
}
func (s turns) Run(_ context.Context, c Case, _ func() time.Duration) (Run, error) {
	*s.log = append(*s.log, s.name+" "+c.Model)
	return Run{Seconds: float64(len(*s.log))}, s.err
}

// All sides of all units take turns, back and forth.
func TestCompareTakesTurns(t *testing.T) {
	var log []string
	a, b := turns{"a", &log, nil}, turns{"b", &log, nil}
	units := []Unit{{Case{Model: "x"}, []Side{a, b}}, {Case{Model: "y"}, []Side{a}}}
	rows, err := Compare(t.Context(), units, 2, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"warm a x", "warm b x", "warm a y", "a x", "b x", "a y", "a y", "b x", "a x"}; !slices.Equal(log, want) {
		t.Errorf("%q, want %q", log, want)
	}
	if len(rows) != 3 || rows[0].Runs[1].Seconds != 9 || rows[2].Model != "y" || rows[1].Side != "b" {
		t.Errorf("%+v", rows)
	}
	broken := turns{"c", &log, errors.New("broken")}
	if _, err := Compare(t.Context(), []Unit{{Case{}, []Side{broken}}}, 1, func(string) {}); err == nil || err.Error() != "c: broken" {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Compare(ctx, units, 1, func(string) {}); err == nil {
		t.Error("went on after the end")
	}
}

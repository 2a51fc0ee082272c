package main

import (
	"flag"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"margo/cpu"
	"margo/engine"
)

// gpu is a device that wants as much work at a time as a GPU does.
type gpu struct{ engine.Device }

func (g gpu) Info() engine.Info {
	return engine.Info{Name: "gpu", WorkingSet: 4 << 30, OwnMemory: true}
}

// A case that does not fit is refused by name and with the sizes, before anything is loaded.
func TestBenchMemory(t *testing.T) {
	dev, err := cpu.New(cpu.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.Bool("interleave", false, "")
	flags.Bool("decode", false, "")
	flags.Int("subset", 0, "")
	j := &benchJob{c: cli.NewContext(nil, flags, nil), dev: dev, dtypes: []engine.DType{engine.F32}, batches: []int{1, 4}, iters: []int{4}, headSteps: []int{4}}
	var subjects []*subject
	for _, name := range []string{"mar-base", "kl-16"} {
		s, err := namedSubject(name)
		if err != nil {
			t.Fatal(err)
		}
		if s.info != nil {
			s.kind = "mar"
			if err := j.marWork(s); err != nil {
				t.Fatal(err)
			}
		}
		subjects = append(subjects, s)
	}
	refused := func(free int64, wants ...string) {
		t.Helper()
		err := j.checkMemory(subjects, free)
		for _, want := range append(wants, "cpu has ") {
			if exitCode(err) != exitFailed || !strings.Contains(err.Error(), want) {
				t.Errorf("with %d bytes: %v, want %q", free, err, want)
			}
		}
	}
	const gib = 1 << 30
	if err := j.checkMemory(subjects, 64*gib); err != nil {
		t.Errorf("64 GiB: %v", err)
	}
	if err := j.checkMemory(subjects, 0); err != nil {
		t.Errorf("a device that does not tell: %v", err)
	}
	refused(gib/4, "the case mar-base 4×4 f32 batch 1: ", "of weights and ", "of activations")
	one, err := j.memory(subjects[0], engine.F32, nil)
	if err != nil || one != nil {
		t.Fatal(one, err)
	}
	cases, err := j.cases(subjects[0], engine.F32)
	if err != nil {
		t.Fatal(err)
	}
	needs, err := j.memory(subjects[0], engine.F32, cases)
	if err != nil || len(needs) != 2 || needs[0].weights < 4*207e6 || needs[1].activity <= needs[0].activity {
		t.Fatalf("%+v, %v", needs, err)
	}
	most := needs[1].weights + needs[1].activity
	refused(most-1, "the case mar-base 4×4 f32 batch 4: ")
	flags.Set("interleave", "true")
	refused(most, "with --interleave", "the case kl-16 decode f32 batch ")

	// A GPU takes 64 images through the trunk at once, a CPU in ten groups.
	j.batches = []int{64}
	if cases, err = j.cases(subjects[0], engine.F32); err != nil {
		t.Fatal(err)
	}
	small, err := j.memory(subjects[0], engine.F32, cases)
	if err != nil {
		t.Fatal(err)
	}
	j.dev = gpu{dev}
	large, err := j.memory(subjects[0], engine.F32, cases)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := small[0].activity, large[0].activity; b < 4*a {
		t.Errorf("a CPU needs %d bytes for 64 images, a GPU %d", a, b)
	}
}

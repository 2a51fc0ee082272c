package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The report is text and JSON of one run, and says what was left out.
func TestSelftest(t *testing.T) {
	text := filepath.Join(t.TempDir(), "r.txt")
	var r selftestReport
	if err := json.Unmarshal([]byte(ok(t, "selftest", "--device", "cpu", "--quick", "--goldens", goldens, "--only", "memory,streams,determinism,fp8,speed",
		"--json", "--out", text)), &r); err != nil {
		t.Fatal(err)
	}
	var steps []string
	for _, s := range r.Steps {
		if steps = append(steps, s.Name); s.Passed == 0 || len(s.Failures) > 0 {
			t.Errorf("%+v", s)
		}
	}
	if !slices.Equal(steps, []string{"memory", "streams", "determinism", "fp8", "speed", "closing"}) || !r.Passed || r.Failed != 0 || !r.Small || r.Device.Name != "cpu" {
		t.Errorf("%+v", r)
	}
	if len(r.LeftOut) != 4 || len(r.Roofline) < 40 || r.Machine.PeakF32 <= 0 || r.Roofline[0].Roofline <= 0 || r.Roofline[0].Bound == "" || r.Roofline[0].Bytes == 0 {
		t.Errorf("left out %q; %d ops, the first %+v", r.LeftOut, len(r.Roofline), r.Roofline[0])
	}
	if len(r.Bench) != 1 || r.Bench[0].Side != "margo" || r.Bench[0].Seconds() <= 0 || r.Bench[0].FLOPs < r.Bench[0].OwnFLOPs || r.Bench[0].OwnFLOPs <= 0 {
		t.Errorf("%+v", r.Bench)
	}
	if r.FP8 == nil || r.FP8.Recorded == nil || r.FP8.Demo == nil || len(r.FP8.Demo.Layers) != 6 || r.FP8.Recorded.Eps <= 0 || r.FP8.Images != nil {
		t.Errorf("%+v", r.FP8)
	}
	b, err := os.ReadFile(text)
	for _, want := range []string{"== streams\n", ": 0 differ from the case alone", "% of the roofline", "margo bench: mar_tiny_trained f32, batch 1", "left out: MAR-B", "selftest of cpu: passed in "} {
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%v: no %q in\n%s", err, want, b)
		}
	}
}

// A failure is in both reports, which are complete, and in the exit code.
func TestSelftestFails(t *testing.T) {
	report := filepath.Join(t.TempDir(), "r.json")
	code, out, msg := margo("selftest", "--device", "cpu", "--goldens", t.TempDir(), "--only", "determinism,traces", "--out", report)
	b, err := os.ReadFile(report)
	var r selftestReport
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if code != exitFailed || err != nil || r.Passed || len(r.Steps) != 3 || r.Failed != len(r.Steps[0].Failures)+len(r.Steps[1].Failures) || r.Failed != 2+len(recordings) ||
		!strings.Contains(msg, "failed 11 checks") || strings.Count(out, "FAIL ") != r.Failed {
		t.Errorf("exit %d, %v: %s\n%+v\n%s", code, err, msg, r, out)
	}
	for _, c := range []struct{ args, want string }{{"--only=speeds", `"speeds" is not a part`}, {"--goldens=nowhere", "no folder nowhere"}} {
		if code, _, msg := margo("selftest", "--device", "cpu", c.args); code != exitUsage || !strings.Contains(msg, c.want) {
			t.Errorf("%s: exit %d: %s", c.args, code, msg)
		}
	}
}

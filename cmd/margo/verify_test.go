package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestVerify(t *testing.T) {
	const traces = "../../testdata/goldens/"
	encdec, trained := traces+"mar_encdec_vis6.safetensors", traces+"mar_trained_sample_cfg1.safetensors"
	whole, err := os.ReadFile(traces + "mar_sample_cfg1.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	more := filepath.Join(t.TempDir(), "more.safetensors")
	if err := os.WriteFile(more, bytes.Replace(whole, []byte(`"num_iter":"4"`), []byte(`"num_iter":"9"`), 1), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string // in the output or the message
	}{
		{[]string{"--model", tiny, "--trace", encdec}, 0, "within their limits"},
		{[]string{"--model", tiny, "--trace", encdec, "--device", "ref"}, 0, "within their limits"},
		{[]string{"--model", tiny, "--trace", encdec, "--dtype", "bf16", "--quiet"}, 0, "within their limits"},
		{[]string{"--model", tiny, "--trace", encdec, "--heads", "2"}, 1, "the oracle itself misses the golden"},
		{[]string{"--model", tiny, "--trace", trained}, 1, "the oracle itself misses the golden"},
		{[]string{"--model", tiny, "--trace", trained, "--dtype", "bf16", "--quiet"}, 1, "other weights or another model"},
		{[]string{"--model", tinyPTH, "--trace", encdec, "--heads", "4", "--patch-size", "1", "--which", "model"}, 0, "within"},
		{[]string{"--model", tinyPTH, "--trace", encdec, "--heads", "4", "--patch-size", "1", "--which", "none"}, 2, "none"},
		{[]string{"--model", tiny, "--trace", more}, 3, "num_iter is 9"},
		{[]string{"--model", tiny, "--trace", tiny}, 3, "no known kind of trace"},
		{[]string{"--model", tiny}, 2, "--trace"},
	} {
		code, out, msg := margo(append([]string{"verify"}, c.args...)...)
		if code != c.code || !strings.Contains(out+msg, c.want) {
			t.Errorf("%v: exit %d, want %d and %q: %s%s", c.args, code, c.code, c.want, out, msg)
		}
	}
	code, out, _ := margo("verify", "--model", tiny, "--trace", encdec, "--heads", "2", "--json")
	var r struct {
		Pass   bool
		Stages []struct {
			Oracle *float64
			Limit  *float64 `json:"oracle_limit"`
			Reason string
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != 1 || r.Pass {
		t.Fatalf("exit %d, %v: %s", code, err, out)
	}
	missed := 0
	for _, s := range r.Stages {
		if s.Oracle == nil || s.Limit == nil {
			t.Fatalf("a stage has no distance of the oracle: %s", out)
		}
		if *s.Oracle > *s.Limit && s.Reason != "" {
			missed++
		}
	}
	if missed == 0 {
		t.Errorf("no stage is missed by the oracle: %s", out)
	}
}

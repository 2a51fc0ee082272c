package repo_test

import (
	"os"
	"testing"

	"margo/cpu"
	"margo/engine/conformance"
	"margo/engine/ref"
)

// TestSupportMatrix keeps docs/support.md true. MARGO_UPDATE=1 writes it.
func TestSupportMatrix(t *testing.T) {
	dev, err := cpu.New(cpu.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	want := "# What each device supports\n\nMade from the devices' own answers; every \"yes\" is run by the conformance table. What a CUDA device supports its plugin\n" +
		"says: `margo selftest --only table` lists what it skips.\n\n" +
		conformance.Support(dev, ref.New(ref.Exact))
	const path = "docs/support.md"
	if os.Getenv("MARGO_UPDATE") != "" {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is out of date; MARGO_UPDATE=1 go test -run SupportMatrix . writes it", path)
	}
}

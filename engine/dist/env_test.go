package dist

import (
	"errors"
	"strings"
	"testing"

	"margo/engine"
)

func env(text string) func(string) string {
	m := map[string]string{}
	for _, kv := range strings.Fields(text) {
		k, v, _ := strings.Cut(kv, "=")
		m[k] = v
	}
	return func(k string) string { return m[k] }
}

func TestFromEnv(t *testing.T) {
	for text, want := range map[string]Place{
		"RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=n0 MASTER_PORT=29500": {3, 4, 1, "n0:29500", "", "torchrun"},
		"RANK=0 WORLD_SIZE=2 MASTER_ADDR=::1 MASTER_PORT=29500 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=j": {0, 2, 0,
			"[::1]:29501", "j", "torchrun"},
		"OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2": {1, 2, 1,
			"127.0.0.1:29511", "", "Open MPI"},
		"PMI_RANK=1 PMI_SIZE=2 MARGO_ADDR=h:7": {1, 2, 0, "h:7", "", "PMI"},
		"SLURM_STEP_ID=0 SLURM_JOB_ID=31234 SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 SLURM_STEP_NODELIST=n[03-05,9],m1": {5, 8, 1,
			"n03:21234", "31234", "Slurm"},
		// torchrun inside a step of Slurm
		"RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1": {1, 2, 0, "a:1", "", "torchrun"},
	} {
		p, err := FromEnv(env(text))
		if err != nil || p == nil || *p != want {
			t.Errorf("%s: %+v, %v; want %+v", text, p, err, want)
		}
	}
	for _, text := range []string{"", "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=1", // a batch script is one process
		"RANK=0 WORLD_SIZE=1", "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1"} {
		if p, err := FromEnv(env(text)); p != nil || err != nil {
			t.Errorf("%q: %+v, %v; want no group", text, p, err)
		}
	}
}

func TestInconsistentEnvironment(t *testing.T) {
	for text, names := range map[string][]string{
		"RANK=0": {"WORLD_SIZE is not set"},
		"WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1":                              {"RANK is not set"},
		"RANK=2 WORLD_SIZE=2":                                                   {"RANK is 2", "WORLD_SIZE is 2"},
		"RANK=x WORLD_SIZE=2":                                                   {"RANK is \"x\""},
		"RANK=0 WORLD_SIZE=2":                                                   {"MASTER_ADDR is not set"},
		"RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0":                       {"MASTER_PORT is \"0\""},
		"RANK=0 WORLD_SIZE=2 MARGO_ADDR=a":                                      {"MARGO_ADDR", "HOST:PORT"},
		"RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=1":          {"LOCAL_RANK is 1", "RANK is 0"},
		"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2":                         {"MARGO_ADDR"},
		"PMI_RANK=0 PMI_SIZE=-1":                                                {"PMI_SIZE is \"-1\""},
		"SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=n[1": {"SLURM_STEP_NODELIST is \"n[1\""},
		"SLURM_STEP_ID=0 SLURM_NTASKS=2":                                        {"SLURM_PROCID is not set"},
	} {
		p, err := FromEnv(env(text))
		if p != nil || !errors.Is(err, engine.Invalid) {
			t.Errorf("%s: %+v, %v", text, p, err)
			continue
		}
		for _, name := range names {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %v, want %q", text, err, name)
			}
		}
	}
}

func TestFirstNode(t *testing.T) {
	for list, want := range map[string]string{"": "", "a": "a", "a,b": "a", "n[03-05,9],m": "n03", "n[7,8]": "n7", "r[1-2]n[4-8],x": "r1n4", "n[1": "", "n]1[": ""} {
		if got := firstNode(list); got != want {
			t.Errorf("%q: %q, want %q", list, got, want)
		}
	}
}

func TestParsePlace(t *testing.T) {
	p, err := ParsePlace("1/4@[::1]:29511")
	if err != nil || *p != (Place{1, 4, 1, "[::1]:29511", "", "--ranks"}) {
		t.Errorf("%+v, %v", p, err)
	}
	for _, s := range []string{"", "1", "1/4", "4/4@h:1", "-1/4@h:1", "0/0@h:1", "0/5000@h:1", "0/4@h", "0/4@:1", "0/4@h:0", "0/4@h:x"} {
		if p, err := ParsePlace(s); !errors.Is(err, engine.Invalid) {
			t.Errorf("%q: %+v, %v", s, p, err)
		}
	}
}

// Shares cover all items once, in order, and differ by at most one.
func TestShare(t *testing.T) {
	for _, size := range []int{1, 2, 4, 7} {
		for n := range 20 {
			next := 0
			for r := range size {
				first, count := (&Place{Rank: r, Size: size}).Share(n)
				if first != next || count != n/size && count != n/size+1 {
					t.Fatalf("%d of %d ranks, %d items: %d from %d", r, size, n, count, first)
				}
				next += count
			}
			if next != n {
				t.Fatalf("%d ranks, %d items: %d shared out", size, n, next)
			}
		}
	}
}

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"margo/engine/dist"
	"margo/engine/testkit"
)

// runRanks runs sample as every rank of a group in one folder.
func runRanks(t *testing.T, size int, args func(rank int) []string) (codes []int, errs []string) {
	t.Helper()
	addr := testkit.FreeAddr(t)
	codes, errs = make([]int, size), make([]string, size)
	var wg sync.WaitGroup
	for r := range size {
		wg.Add(1)
		go func() {
			defer wg.Done()
			codes[r], _, errs[r] = margo(quick(append(args(r), "--ranks", fmt.Sprintf("%d/%d@%s", r, size, addr))...)...)
		}()
	}
	wg.Wait()
	return codes, errs
}

// Ranks make, file by file, the bytes of one process, also where some have nothing to do.
func TestRanksMakeTheImagesOfOne(t *testing.T) {
	one := filepath.Join(t.TempDir(), "one")
	flags := func(dir string) []string {
		return []string{"-n", "3", "--first-index", "2", "--seed", "5", "--batch", "2", "--threads", "1", "--out", dir}
	}
	ok(t, quick(flags(one)...)...)
	for _, size := range []int{2, 4} {
		dir := filepath.Join(t.TempDir(), "many")
		codes, errs := runRanks(t, size, func(int) []string { return flags(dir) })
		for r, code := range codes {
			if code != exitOK {
				t.Fatalf("%d ranks: rank %d: exit %d: %s", size, r, code, errs[r])
			}
		}
		if got, want := files(t, dir), files(t, one); !slices.Equal(got, want) {
			t.Fatalf("%d ranks made %v, one makes %v", size, got, want)
		}
		for _, name := range files(t, one) {
			a, err := os.ReadFile(filepath.Join(one, name))
			if err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(a) != string(b) {
				t.Errorf("%d ranks: %s differs from that of one (%v)", size, name, err)
			}
		}
	}
}

func TestRanksRefuse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	codes, errs := runRanks(t, 2, func(rank int) []string { return []string{"-n", "2", "--seed", fmt.Sprint(rank), "--out", dir} })
	if codes[0] == exitOK || codes[1] == exitOK || !strings.Contains(errs[1], "other flags") {
		t.Errorf("ranks with other seeds: %v %q", codes, errs)
	}
	codes, errs = runRanks(t, 2, func(rank int) []string { return []string{"-n", "2", "--tile", fmt.Sprint(16 + 4*rank), "--out", dir} })
	if codes[0] == exitOK || codes[1] == exitOK || !strings.Contains(errs[1], "other flags") {
		t.Errorf("ranks with other tiles: %v %q", codes, errs)
	}
	if code, _, err := margo(quick("--ranks", "0/2@127.0.0.1:1", "--out", filepath.Join(t.TempDir(), "a.png"))...); code != exitUsage || !strings.Contains(err, "folder") {
		t.Errorf("a sheet of ranks: exit %d: %s", code, err)
	}
	if code, _, err := margo(quick("--ranks", "3/x", "--out", dir)...); code != exitUsage || !strings.Contains(err, `--ranks: "3/x"`) {
		t.Errorf("ranks that are none: exit %d: %s", code, err)
	}
	t.Setenv("RANK", "1")
	if code, _, err := margo(quick("--out", dir)...); code != exitUsage || !strings.Contains(err, "WORLD_SIZE is not set") {
		t.Errorf("RANK alone: exit %d: %s", code, err)
	}
}

func TestDeviceOfRank(t *testing.T) {
	third := &dist.Place{Rank: 7, Size: 8, Local: 3}
	for _, c := range []struct {
		name  string
		place *dist.Place
		count int
		want  string
	}{
		{"cuda", third, 4, "cuda:3"}, {"cuda", third, 1, "cuda:0"}, {"emu", third, 8, "emu:3"}, {"cuda", third, 0, "cuda:3"},
		{"cuda:1", third, 4, "cuda:1"}, {"cpu", third, 4, "cpu"}, {"cuda", nil, 4, "cuda"},
	} {
		if got := deviceOf(c.name, c.place, func(string) (int, error) { return c.count, nil }); got != c.want {
			t.Errorf("%s with %d devices is %s for %+v, want %s", c.name, c.count, got, c.place, c.want)
		}
	}
	if got := deviceOf("cuda", third, func(string) (int, error) { return 0, os.ErrNotExist }); got != "cuda:0" {
		t.Errorf("without a plugin: %s", got)
	}
}

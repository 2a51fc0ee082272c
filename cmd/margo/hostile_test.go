package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sparse writes a safetensors file of one tensor whose data are a hole: it takes
// a block of the disk, and a terabyte of whoever reads it.
func sparse(t *testing.T, path, tensor, dtype string, size int64, shape string) string {
	t.Helper()
	head := fmt.Sprintf(`{"%s":{"dtype":"%s","shape":%s,"data_offsets":[0,%d]}}`, tensor, dtype, shape, size)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(head))), head...)
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(len(b))+size); err != nil {
		t.Fatal(err)
	}
	return path
}

// What would take more memory than there is, is refused before it is taken: the
// Go runtime ends a process whose allocation fails.
func TestTooLargeForMemory(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	small := picture(t, at("small.png"), 16, 16)
	if err := unix.Mkfifo(at("fifo.png"), 0o666); err != nil {
		t.Fatal(err)
	}
	latents := sparse(t, at("latents.safetensors"), "latents", "F32", 1<<40, "[1,16,65536,262144]")
	codes := sparse(t, at("codes.safetensors"), "codes", "U8", 1<<38, "[1,524288,524288]")
	many := sparse(t, at("many.safetensors"), "codes", "U8", 1<<33, "[8589934592,1,1]") // little each
	trace := sparse(t, at("trace.safetensors"), "decoded", "F32", 1<<40, "[1,16,65536,262144]")
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"encode", small, "-t", fashionKL, "--size", "65536x65536", "--recon", at("r")}, 2, "at most 67108864 pixels"},
		{[]string{"encode", small, "-t", fashionKL, "--size", "9223372036854775807x2", "--recon", at("r")}, 2, "at most 67108864 pixels"},
		{[]string{"encode", at("fifo.png"), "-t", fashionKL, "--recon", at("r")}, 3, "not a regular file"},
		{[]string{"sample", "--model", fashion, "--image", at("fifo.png"), "--mask", small, "--out", at("o")}, 3, "not a regular file"},
		{[]string{"decode", latents, "-t", fashionKL, "--out", at("d")}, 1, "not enough memory"},
		{[]string{"decode", codes, "-t", vqTaming, "--out", at("d")}, 1, "not enough memory"},
		{[]string{"decode", many, "-t", vqTaming, "--out", at("d")}, 1, "not enough memory"},
		{[]string{"verify", "--model", tiny, "--trace", trace}, 3, "the float64 oracle cannot hold"},
	} {
		code, _, msg := margo(c.args...)
		if code != c.code || !strings.Contains(msg, c.want) {
			t.Errorf("margo %s: exit %d, want %d with %q: %s", strings.Join(c.args, " "), code, c.code, c.want, msg)
		}
	}
	if left := files(t, dir); len(left) != 6 {
		t.Errorf("left behind: %v", left)
	}
}

// An image is compared with the host's memory before it is decoded.
func TestImageTooLargeForMemory(t *testing.T) {
	path := picture(t, filepath.Join(t.TempDir(), "small.png"), 100, 50)
	if w, h, err := checkImage(path, 100*50*32); w != 100 || h != 50 || err != nil {
		t.Error(w, h, err)
	}
	_, _, err := checkImage(path, 100*50*32-1)
	if exitCode(err) != exitFailed || !strings.Contains(err.Error(), "not enough memory") || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
}

// full is a disk without space.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// What could not be printed is a failure, for text as for JSON.
func TestFullStandardOutput(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"help", "sample"}, {"version"}, {"devices"}, {"inspect", fashion}, {"inspect", fashion, "--json"}, {"completion", "bash"}} {
		var msg strings.Builder
		code := run(args, full{}, &msg, make(chan os.Signal))
		if code != exitFailed || !strings.Contains(msg.String(), "standard output: no space left on device") {
			t.Errorf("margo %v: exit %d, %s", args, code, msg.String())
		}
	}
}

package checkpoint

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fileRSS is this process's resident file-backed memory in bytes.
func fileRSS(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kb int64
		if n, _ := fmt.Sscanf(line, "RssFile: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Skip("the kernel does not report RssFile")
	return 0
}

// Release gives back what reading mapped in.
func TestRelease(t *testing.T) {
	const size = 64 << 20
	path := filepath.Join(t.TempDir(), "big")
	if err := Save(context.Background(), path, []Entry{entry("a", U8, []int{size}, make([]byte, size))}, nil); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, path, OpenOptions{})
	buf := make([]byte, size)
	before := fileRSS(t)
	if err := f.ReadRaw("a", buf); err != nil {
		t.Fatal(err)
	}
	read := fileRSS(t)
	f.Release("a")
	after := fileRSS(t)
	if read-before < size*9/10 {
		t.Skipf("reading %d bytes mapped only %d", size, read-before)
	}
	if after-before > size/10 {
		t.Errorf("%d of %d bytes stay resident after Release", after-before, size)
	}
}

func BenchmarkRead(b *testing.B) {
	const n = 8 << 20
	path := filepath.Join(b.TempDir(), "big")
	if err := Save(context.Background(), path, []Entry{entry("f32", F32, []int{n}, make([]byte, 4*n)), entry("bf16", BF16, []int{n}, make([]byte, 2*n))}, nil); err != nil {
		b.Fatal(err)
	}
	f, err := Open(path, OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for _, name := range []string{"f32", "bf16"} {
		for _, to := range []DType{F32, BF16} {
			b.Run(name+"-to-"+strings.ToLower(string(to)), func(b *testing.B) {
				dst := make([]byte, n*to.Size())
				info, _ := f.Tensor(name)
				b.SetBytes(info.Bytes())
				for range b.N {
					if err := f.readInto(f.tensors[name], to, dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

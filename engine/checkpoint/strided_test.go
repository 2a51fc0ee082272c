package checkpoint

import (
	"archive/zip"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// holes turns long writes, which are zeros here, into holes of a file.
type holes struct{ *os.File }

func (h holes) Write(p []byte) (int, error) {
	if len(p) < 1<<20 {
		return h.File.Write(p)
	}
	_, err := h.Seek(int64(len(p)), io.SeekCurrent)
	return len(p), err
}

// sparseArchive writes an archive of one storage of size bytes that takes a few
// blocks of the disk: all zeros but for the end.
func sparseArchive(t *testing.T, pickle []byte, size int64, end []byte) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "sparse.pth"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	z := zip.NewWriter(holes{file})
	w, err := z.CreateHeader(&zip.FileHeader{Name: "archive/data.pkl", Method: zip.Store})
	if err != nil {
		t.Fatal(err)
	}
	w.Write(pickle)
	w, err = z.CreateRaw(&zip.FileHeader{Name: "archive/data/0", UncompressedSize64: uint64(size), CompressedSize64: uint64(size)})
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 256<<20)
	for left := size - int64(len(end)); left > 0 && err == nil; {
		n := min(left, int64(len(zeros)))
		_, err = w.Write(zeros[:n])
		left -= n
	}
	w.Write(end)
	if e := z.Close(); err != nil || e != nil {
		t.Fatal(err, e)
	}
	return file.Name()
}

// A tensor of six numbers that spans 256 GiB of a sparse file takes the memory of
// six numbers, through the mapping and without one.
func TestSparseStrided(t *testing.T) {
	const elems = 1 << 36
	p := newPickler().op("}(")
	p.str("w").tensor("FloatStorage", "0", elems, 0, []int64{3, 2}, []int64{elems/2 - 1, 1})
	p.str("pair").tensor("FloatStorage", "0", elems, elems-4, []int64{2}, []int64{3})
	p.op("u.")
	path := sparseArchive(t, p.Bytes(), 4*elems, floats(5, 6, 7, 8))
	for _, mapped := range []bool{true, false} {
		r, err := openRegion(path)
		if err != nil {
			t.Fatal(err)
		}
		if !mapped && r.mapped {
			munmap(r.mem)
			r.mem, r.mapped = nil, false
		}
		f, err := openFrom(r, path, OpenOptions{SkipCRC: true})
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		w, pair := make([]float32, 6), make([]float32, 2)
		if err := f.ReadF32("w", w); err != nil || !bytes.Equal(floats(w...), floats(0, 0, 0, 0, 7, 8)) {
			t.Errorf("mapped %v: %v, %v", mapped, w, err)
		}
		if err := f.ReadF32("pair", pair); err != nil || pair[0] != 5 || pair[1] != 8 {
			t.Errorf("mapped %v: %v, %v", mapped, pair, err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
			t.Errorf("mapped %v: reading 8 numbers allocated %d bytes", mapped, n)
		}
		f.Close()
		wantBad(t, "closed", f.ReadF32("w", w), "closed")
	}
}

// Two storages in the same bytes are refused: a file of a kilobyte could name all of
// a large one a million times.
func TestOverlappingMembers(t *testing.T) {
	p := newPickler().op("}(")
	p.str("a").tensor("FloatStorage", "0", 2, 0, []int64{2}, []int64{1})
	p.str("b").tensor("FloatStorage", "1", 2, 0, []int64{2}, []int64{1})
	p.op("u.")
	b := archiveOf(t, p.Bytes(), map[string][]byte{"0": floats(1, 2), "1": floats(1, 2)})
	if _, err := openBytes(b, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	entry := func(name string) []byte { // of the directory: 46 bytes, then the name
		return b[bytes.LastIndex(b, []byte(name))-46:]
	}
	copy(entry("archive/data/1")[42:46], entry("archive/data/0")[42:46])
	_, err := openBytes(b, OpenOptions{})
	wantBad(t, "overlapping", err, `"data/0"`, `"data/1"`, "overlap")
}

// Strides count too in what is joined from parts, and in copies that must be equal.
func TestStridedDiffusersDiT(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "diffusion_pytorch_model.safetensors")
	diffusersDiT(t, plain, nil)
	r, err := openRegion(plain)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f, err := openSafetensors(r, plain) // without translating names
	if err != nil {
		t.Fatal(err)
	}
	p, storages := newPickler().op("}("), map[string][]byte{}
	for i, name := range f.Names() {
		info, _ := f.Tensor(name)
		b := make([]byte, info.Bytes())
		if err := f.ReadRaw(name, b); err != nil {
			t.Fatal(err)
		}
		shape, stride, key := make([]int64, len(info.Shape)), make([]int64, len(info.Shape)), fmt.Sprint(i)
		at := int64(1)
		for d := range shape { // every other matrix column by column: copies differ in order
			shape[d], stride[d] = int64(info.Shape[d]), at
			at *= shape[d]
		}
		if i%2 == 0 || len(shape) != 2 {
			at = 1
			for d := len(shape) - 1; d >= 0; d-- {
				stride[d] = at
				at *= shape[d]
			}
		} else {
			turned := make([]byte, len(b))
			for k := range int(at) {
				copy(turned[(k%info.Shape[1]*info.Shape[0]+k/info.Shape[1])*4:], b[4*k:4*k+4])
			}
			b = turned
		}
		p.str(name).tensor("FloatStorage", key, info.Elems(), 0, shape, stride)
		storages[key] = b
	}
	p.op("u.")
	strided := filepath.Join(filepath.Dir(plain), "model.pth") // beside the same config.json
	if err := os.WriteFile(strided, archiveOf(t, p.Bytes(), storages), 0o666); err != nil {
		t.Fatal(err)
	}
	sameTensors(t, mustOpen(t, strided, OpenOptions{}), mustOpen(t, plain, OpenOptions{}))
	m := mustOpen(t, strided, OpenOptions{})
	if _, err := Describe(m, MAROptions{}); err != nil { // compares the embedders
		t.Error(err)
	}
}

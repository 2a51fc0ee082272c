package cuda

import (
	"errors"
	"slices"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/conformance"
)

const mebi = 1 << 20

// TestPoolReuses: freed memory of a size serves the next of about that size; the counters say so, and what is
// cached is given back when there is too much of it, or on demand.
func TestPoolReuses(t *testing.T) {
	d := openDevice(t, Options{Cache: 10 * mebi})
	took := func(n int) engine.Buffer {
		t.Helper()
		b, err := d.Alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	is := func(what string, c Counters) {
		t.Helper()
		g := d.Counters()
		if got := (Counters{Allocs: g.Allocs, Held: g.Held, Peak: g.Peak, DeviceAllocs: g.DeviceAllocs, Reuses: g.Reuses, Trims: g.Trims, Cached: g.Cached, Taken: g.Taken, TakenPeak: g.TakenPeak}); got != c {
			t.Errorf("%s: %+v, want %+v", what, got, c)
		}
	}
	free := func(b engine.Buffer) {
		t.Helper()
		if err := b.Free(); err != nil {
			t.Fatal(err)
		}
	}
	a := took(1000) // 1024: steps are 256 bytes up to 4 KiB, then an eighth of an octave or less
	is("one", Counters{Allocs: 1, Held: 1000, Peak: 1000, DeviceAllocs: 1, Taken: 1024, TakenPeak: 1024})
	free(a)
	is("freed", Counters{Allocs: 1, Peak: 1000, DeviceAllocs: 1, Cached: 1024, Taken: 1024, TakenPeak: 1024})
	a = took(1010)
	is("reused", Counters{Allocs: 2, Held: 1010, Peak: 1010, DeviceAllocs: 1, Reuses: 1, Taken: 1024, TakenPeak: 1024})
	b := took(9*mebi - 5) // 9 MiB
	free(b)
	free(a)
	is("two cached", Counters{Allocs: 3, Peak: 9*mebi + 1005, DeviceAllocs: 2, Reuses: 1, Cached: 9*mebi + 1024, Taken: 9*mebi + 1024, TakenPeak: 9*mebi + 1024})
	free(took(2 * mebi)) // more than the cache holds: the oldest goes
	is("the oldest went", Counters{Allocs: 4, Peak: 9*mebi + 1005, DeviceAllocs: 3, Reuses: 1, Trims: 1, Cached: 2*mebi + 1024, Taken: 2*mebi + 1024, TakenPeak: 11*mebi + 1024})
	free(took(11*mebi - 1)) // larger than the whole cache: as it is
	if err := d.Trim(); err != nil {
		t.Fatal(err)
	}
	is("trimmed", Counters{Allocs: 5, Peak: 11*mebi - 1, DeviceAllocs: 4, Reuses: 1, Trims: 3, TakenPeak: 13*mebi + 1023})
}

// TestPoolOrder: memory that a stream still uses when it is freed is not written by the stream that gets it next, nor by
// one that is made later, until the first has done its work. On the emulator a stream runs only when it is waited
// for, or what others wait for: without the order the first stream would come last.
func TestPoolOrder(t *testing.T) {
	d := openDevice(t, Options{Cache: 64 * mebi})
	stream := func() engine.Stream {
		t.Helper()
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	tensor := func() *engine.Tensor {
		t.Helper()
		b, err := d.Alloc(4 * 64 * 64)
		if err != nil {
			t.Fatal(err)
		}
		return engine.NewTensor(b, 0, engine.F32, 64, 64)
	}
	read := func(s engine.Stream, x *engine.Tensor) float32 {
		t.Helper()
		c := &engine.Ctx{Stream: s}
		v := c.Download(x)
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		for _, e := range v {
			if e != v[0] {
				t.Fatalf("values differ: %v and %v", v[0], e)
			}
		}
		return v[0]
	}
	first, second, one := stream(), stream(), tensor()
	for _, next := range []string{"the other stream", "a new stream", "the same stream", "while a stream captures"} {
		old := []*engine.Tensor{tensor(), tensor()}
		copied := []*engine.Tensor{tensor(), tensor()}
		err := errors.Join(first.Fill(one, 6), first.Fill(old[0], 2), first.Fill(old[1], 3), first.Sync())
		for i, x := range old {
			for range 5 {
				err = errors.Join(err, first.GatedAdd(engine.GatedAddArgs{X: x, H: one, Y: x}))
			}
			err = errors.Join(err, first.Copy(copied[i], x))
		}
		before := d.Counters()
		for _, x := range old { // the stream has done nothing of it yet
			err = errors.Join(err, x.Buf.Free())
		}
		if err != nil {
			t.Fatal(err)
		}
		var got []*engine.Tensor
		take := func() { got = []*engine.Tensor{tensor(), tensor()} }
		s := second
		switch next {
		case "while a stream captures":
			if _, err := stream().Capture(func() error { take(); return errors.New("no graph is wanted") }); err == nil {
				t.Fatal("captured")
			}
		case "a new stream":
			take()
			s = stream()
		case "the same stream":
			take()
			s = first
		default:
			take()
		}
		if n := d.Counters(); n.Reuses != before.Reuses+2 || n.DeviceAllocs != before.DeviceAllocs || n.Syncs != before.Syncs {
			t.Errorf("%s: reused %d, allocated %d, waited %d times", next, n.Reuses-before.Reuses, n.DeviceAllocs-before.DeviceAllocs, n.Syncs-before.Syncs)
		}
		for i, y := range got {
			if err := s.Fill(y, float32(7+i)); err != nil {
				t.Fatal(err)
			}
		}
		for _, when := range []string{"", ", after all is done"} {
			for i := range got {
				if a, b := read(s, got[i]), read(first, copied[i]); a != float32(7+i) || b != float32(32+i) {
					t.Errorf("%s%s: the new owner reads %v, want %d; the old one had copied %v, want %d", next, when, a, 7+i, b, 32+i)
				}
			}
			p, err := d.Pack(engine.PackArgs{W: one, DType: engine.F32}) // waits for all streams
			if err == nil {
				err = p.Free()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, x := range slices.Concat(got, copied) {
			if err := x.Buf.Free(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := one.Buf.Free(); err != nil {
		t.Fatal(err)
	}
}

// TestPoolMarkedWhileEnqueuing: work that a thread enqueues while another marks its stream is waited for before its memory
// is handed out again.
func TestPoolMarkedWhileEnqueuing(t *testing.T) {
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_SLOW_RECORD", "60") // milliseconds, after the mark was made
	d := openDevice(t, Options{Cache: 64 * mebi})
	tensor := func(rows int) *engine.Tensor {
		t.Helper()
		b, err := d.Alloc(4 * 64 * rows)
		if err != nil {
			t.Fatal(err)
		}
		return engine.NewTensor(b, 0, engine.F32, rows, 64)
	}
	var streams [2]engine.Stream
	for i := range streams {
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		streams[i] = s
	}
	x, copied, other := tensor(64), tensor(64), tensor(8)
	first, second := streams[0], streams[1]
	if err := errors.Join(first.Fill(x, 2), first.Sync(), first.Fill(other, 1)); err != nil {
		t.Fatal(err)
	}
	marked := make(chan error)
	go func() { marked <- other.Buf.Free() }()
	time.Sleep(20 * time.Millisecond)
	if err := errors.Join(first.Copy(copied, x), <-marked, x.Buf.Free()); err != nil {
		t.Fatal(err)
	}
	y := tensor(64)
	if n := d.Counters().Reuses; n != 1 {
		t.Fatalf("%d buffers were reused", n)
	}
	c := &engine.Ctx{Stream: second}
	if err := second.Fill(y, 7); err != nil {
		t.Fatal(err)
	}
	if v := c.Download(y); c.Err() != nil || v[0] != 7 {
		t.Errorf("the new owner reads %v, %v", v[0], c.Err())
	}
	c.Stream = first
	if v := c.Download(copied); c.Err() != nil || v[0] != 2 || v[len(v)-1] != 2 {
		t.Errorf("the old owner had copied %v, want 2; %v", v[0], c.Err())
	}
	if err := errors.Join(y.Buf.Free(), copied.Buf.Free()); err != nil {
		t.Error(err)
	}
}

// TestPoolLimit: the limit and the device's own memory are kept, what is cached goes before an allocation fails, and the
// failure says what was asked, held, cached and free.
func TestPoolLimit(t *testing.T) {
	d := openDevice(t, Options{Limit: 10 * mebi, Cache: 8 * mebi})
	var bs []engine.Buffer
	take := func(n int) {
		t.Helper()
		b, err := d.Alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		bs = append(bs, b)
	}
	drop := func() {
		t.Helper()
		for _, b := range bs {
			if err := b.Free(); err != nil {
				t.Fatal(err)
			}
		}
		bs = nil
	}
	take(4 * mebi)
	take(3 * mebi)
	drop()
	if c := d.Counters(); c.Cached != 7*mebi || d.Info().MemFree != 10*mebi {
		t.Errorf("%d bytes cached, %d free", c.Cached, d.Info().MemFree)
	}
	take(5 * mebi) // the cached 4 MiB, freed first, make room
	if c := d.Counters(); c.Trims != 1 || c.Taken != 8*mebi || d.Info().MemFree != 5*mebi {
		t.Errorf("%+v, %d free", c, d.Info().MemFree)
	}
	_, err := d.Alloc(6 * mebi)
	wantError(t, "beyond the limit", err, engine.OutOfMemory, "6.0 MiB asked, 5.0 MiB held, 3.0 MiB cached and given back, ")
	wantError(t, "beyond the limit", err, engine.OutOfMemory, "limit 10.0 MiB")
	_, err = d.Alloc(1 << 60)
	wantError(t, "an exbibyte", err, engine.OutOfMemory, "5.0 MiB held, 0.0 MiB cached, ")
	take(5 * mebi)
	drop()
	if err := d.SetMemory(0, 0); err != nil || d.Counters().Cached != 0 {
		t.Errorf("%v, %d bytes cached without a cache", err, d.Counters().Cached)
	}
	wantError(t, "a negative limit", d.SetMemory(-1, 0), engine.Invalid, "a limit of -1 bytes")
}

// TestPoolEnvironment: limit and cache are settable without the program's help.
func TestPoolEnvironment(t *testing.T) {
	t.Setenv("MARGO_CUDA_MEMORY", "1.5MiB")
	t.Setenv("MARGO_CUDA_CACHE", "64KiB")
	d := openDevice(t, Options{})
	if c := d.Counters(); c.Limit != 3*mebi/2 || c.Cache != 64<<10 {
		t.Errorf("limit %d, cache %d", c.Limit, c.Cache)
	}
	if d := openDevice(t, Options{Limit: mebi, Cache: -1}); d.Counters().Limit != mebi || d.Counters().Cache != 0 {
		t.Errorf("options: %+v", d.Counters())
	}
	for _, bad := range []string{"much", "-1", "1e30", "NaN", "5 MB"} {
		t.Setenv("MARGO_CUDA_MEMORY", bad)
		_, err := Open("emu:0", Options{})
		wantError(t, bad, err, engine.Invalid, "MARGO_CUDA_MEMORY: ")
	}
}

// TestPoolMemoryTaken: another process takes what was free; what this one has cached is given back before it fails, and
// it works again when there is memory.
func TestPoolMemoryTaken(t *testing.T) {
	emulatorOnly(t)
	t.Setenv("MARGO_EMU_MEMORY", "33554432")
	d := openDevice(t, Options{Cache: 32 * mebi})
	one, err := d.Alloc(12 * mebi)
	if err != nil {
		t.Fatal(err)
	}
	if err := one.Free(); err != nil {
		t.Fatal(err)
	}
	b, err := d.Alloc(24 * mebi) // fits once the cache is empty
	if err != nil {
		t.Fatal(err)
	}
	if c := d.Counters(); c.Cached != 0 || c.Trims != 1 {
		t.Errorf("%+v", c)
	}
	_, err = d.Alloc(12 * mebi)
	wantError(t, "all memory held", err, engine.OutOfMemory, "12.0 MiB asked, 24.0 MiB held, 0.0 MiB cached, 8.0 of 32.0 MiB free")
	if err := b.Free(); err != nil {
		t.Fatal(err)
	}
}

// TestPoolSampling: with a cache images are those without one, in a shuffled order of streams too, and streams that race
// for freed memory compute what they compute alone.
func TestPoolSampling(t *testing.T) {
	emulatorOnly(t)
	draw := func(o Options) [][]float32 {
		t.Helper()
		d, err := Open("emu:0", o)
		if err != nil {
			t.Fatal(err)
		}
		var tokens [][]float32
		t.Run("", func(t *testing.T) { tokens, _ = runSampler(t, d, openSampler(t, d, engine.BF16), 2, 3) })
		if o.Cache > 0 {
			r := conformance.Race(d, conformance.RaceOptions{Workers: 3})
			if c := d.Counters(); len(r.Failures) > 0 || r.Runs < 100 || c.Reuses < uint64(r.Runs) {
				t.Errorf("%+v, %+v", r, c)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		return tokens
	}
	want := draw(Options{})
	for _, seed := range []string{"0", "5"} {
		t.Setenv("MARGO_EMU_SEED", seed)
		for i, v := range draw(Options{Cache: 256 * mebi}) {
			if !slices.Equal(v, want[i]) {
				t.Errorf("seed %s: image %d differs with a cache", seed, i)
			}
		}
	}
}

// TestPoolPinned: staging memory of closed streams serves the next ones.
func TestPoolPinned(t *testing.T) {
	d := openDevice(t, Options{})
	b, err := d.Alloc(mebi)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	x := engine.NewTensor(b, 0, engine.F32, mebi/4)
	host := slices.Repeat([]byte{1, 2, 3, 4}, mebi/4)
	for i := range 5 {
		s, err := d.NewStream()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, mebi)
		if err := errors.Join(s.CopyIn(x, host), s.CopyOut(got, x), s.Close()); err != nil || !slices.Equal(host, got) {
			t.Fatalf("%v, or other bytes", err)
		}
		if n := d.Counters().Pinned; n != mebi {
			t.Errorf("stream %d: %d bytes pinned", i, n)
		}
	}
}

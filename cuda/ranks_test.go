package cuda

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"margo/engine"
	"margo/engine/dist"
	"margo/engine/sample"
	"margo/engine/testkit"
)

// asRanks runs f as every rank of a group of ranks with a device each.
func asRanks(t *testing.T, size int, f func(rank *dist.Group, p dist.Place, d *Device) error) {
	t.Helper()
	addr := testkit.FreeAddr(t)
	devices, errs := make([]*Device, size), make([]error, size)
	for r := range devices {
		devices[r] = testDevice(t)
	}
	var wg sync.WaitGroup
	for r := range size {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := dist.Place{Rank: r, Size: size, Addr: addr}
			g, err := dist.Join(context.Background(), p, time.Minute)
			if err == nil {
				defer g.Close()
				err = f(g, p, devices[r])
			}
			errs[r] = err
		}()
	}
	wg.Wait()
	for r, err := range errs {
		if err != nil {
			t.Errorf("rank %d of %d: %v", r, size, err)
		}
	}
}

// Ranks with devices of this package sum in the order of ranks, bit for bit, and
// broadcast, after work that is still enqueued.
func TestRanksReduce(t *testing.T) {
	const n = 777
	value := func(rank, i int) float32 {
		return float32(math.Ldexp(float64(1+(i*7+rank*13)%17), (i*5+rank*11)%40-20)) * float32(1-2*((i+rank)%2))
	}
	for _, size := range []int{2, 4} {
		var sum []byte
		for i := range n {
			var v float32
			for r := range size {
				v += 2 * value(r, i)
			}
			sum = binary.LittleEndian.AppendUint32(sum, math.Float32bits(v))
		}
		asRanks(t, size, func(g *dist.Group, p dist.Place, d *Device) error {
			s, err := d.NewStream()
			if err != nil {
				return err
			}
			defer s.Close()
			buf, err := d.Alloc(8 * n)
			if err != nil {
				return err
			}
			defer buf.Free()
			x, y := engine.NewTensor(buf, 0, engine.F32, n), engine.NewTensor(buf, 4*n, engine.F32, n)
			var mine []byte
			for i := range n {
				mine = binary.LittleEndian.AppendUint32(mine, math.Float32bits(value(p.Rank, i)))
			}
			got, first := make([]byte, 4*n), make([]byte, 4*n)
			if err := errors.Join(s.CopyIn(x, mine), s.Cast(engine.CastArgs{X: x, Y: y, Scale: 2}), // y = 2x
				g.AllReduce(s, y), s.CopyOut(got, y), g.Broadcast(s, size-1, x), s.CopyOut(first, x)); err != nil {
				return err
			}
			if !bytes.Equal(got, sum) {
				return errors.New("not the sum in the order of ranks")
			}
			if v := math.Float32frombits(binary.LittleEndian.Uint32(first)); v != value(size-1, 0) {
				return fmt.Errorf("broadcast %g, want %g", v, value(size-1, 0))
			}
			return nil
		})
	}
}

// Ranks that share a request make the images of one rank, bit for bit: 1, 2 and 4 of
// them, with a device each, at the same time.
func TestRanksSampleTheImagesOfOne(t *testing.T) {
	const n = 4
	r := sample.Defaults()
	r.N, r.Batch, r.Iters, r.HeadSteps, r.MaxTimestep, r.CFG, r.Labels, r.Seed, r.FirstIndex = n, n, 2, 3, 950, 2, []int{3, 7, 1}, 11, 5
	var want [][]float32
	for _, size := range []int{1, 2, 4} {
		got := make([][]float32, n)
		var mu sync.Mutex
		asRanks(t, size, func(g *dist.Group, p dist.Place, d *Device) error {
			e := func() *sample.Engine { // one at a time; a failure ends this rank, and so the group
				mu.Lock()
				defer mu.Unlock()
				return openSampler(t, d, engine.F32)
			}()
			if err := g.Barrier(); err != nil {
				return err
			}
			mine := r
			first, count := p.Share(n)
			mine.FirstIndex, mine.N, mine.Batch = r.FirstIndex+first, count, count
			return e.Run(context.Background(), mine, nil, func(im sample.Image) error {
				mu.Lock()
				defer mu.Unlock()
				if i := im.Index - r.FirstIndex; i < first || i >= first+count || got[i] != nil {
					return fmt.Errorf("image %d of rank %d", im.Index, p.Rank)
				}
				got[im.Index-r.FirstIndex] = im.Tokens
				return nil
			})
		})
		if t.Failed() {
			return
		}
		if want == nil {
			want = got
		}
		for i := range want {
			if len(got[i]) == 0 || !slices.Equal(got[i], want[i]) {
				t.Errorf("%d ranks: image %d is not that of one rank", size, r.FirstIndex+i)
			}
		}
	}
}

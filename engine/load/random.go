package load

import (
	"encoding/binary"
	"hash/fnv"
	"math"
	"runtime"
	"strings"
	"sync"

	"margo/engine"
)

// Random fills the parameters with values that keep activations of order one,
// for benchmarks and for tests without a checkpoint: norm weights 1, all else
// near-normal with mean 0 and standard deviation 0.02. Values depend on seed,
// name and position only, not on device, dtype or the other parameters.
func Random(params []engine.NamedParam, dev engine.Device, compute engine.DType, seed uint64) error {
	src := random{seed: seed, ones: map[string]bool{}}
	for _, p := range params {
		// The only one-dimensional weights are those of norms.
		if len(p.Shape) == 1 && strings.HasSuffix(p.Name, "weight") {
			src.ones[p.Name] = true
		}
	}
	return Fill(params, src, dev, compute, nil)
}

// random is a Source without a file.
type random struct {
	seed uint64
	ones map[string]bool
}

func (random) Release(string) {}

// randomBlock is the number of elements one goroutine fills at a time.
const randomBlock = 1 << 16

func (r random) ReadAs(name string, d engine.DType, dst []byte) error {
	n := len(dst) / d.Size()
	if r.ones[name] {
		for i := 0; i < n; i++ {
			put(dst, i, d, 1)
		}
		return nil
	}
	h := fnv.New64a()
	h.Write([]byte(name))
	key := h.Sum64() ^ r.seed
	var wg sync.WaitGroup
	limit := make(chan struct{}, runtime.GOMAXPROCS(0))
	for first := 0; first < n; first += randomBlock {
		wg.Add(1)
		limit <- struct{}{}
		go func() {
			defer wg.Done()
			fillRandom(dst, first, min(n, first+randomBlock), d, key)
			<-limit
		}()
	}
	wg.Wait()
	return nil
}

// fillRandom sets elements from … to-1, from a multiple of 4. The sum of four
// uniform bytes has mean 510 and variance 4·(256²−1)/12: close enough to a
// normal distribution, at a quarter of a Philox call for each value.
func fillRandom(dst []byte, from, to int, d engine.DType, key uint64) {
	scale := float32(0.02 / math.Sqrt(4*(256*256-1)/12.0))
	for i := from; i < to; i += 4 {
		for j, w := range engine.Philox(engine.Counter(engine.PurposeInit, 0, i, 0, 0), key) {
			if i+j < to {
				sum := w&255 + w>>8&255 + w>>16&255 + w>>24
				put(dst, i+j, d, (float32(sum)-510)*scale)
			}
		}
	}
}

func put(dst []byte, i int, d engine.DType, v float32) {
	if d == engine.BF16 {
		binary.LittleEndian.PutUint16(dst[2*i:], engine.ToBF16(v))
		return
	}
	binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(v))
}

package bench

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"margo/engine"
)

// energy reads joules used so far, from a counter that may wrap.
type energy struct {
	read func() []float64 // of every counter; nil: none
	wrap []float64        // after which a counter begins again; 0: never
}

// energyOf is the counter of a device that has one, else of the processor's packages
// (Linux powercap, which many systems let only root read).
func energyOf(dev engine.Device) energy {
	if d, ok := dev.(interface{ EnergyJoules() (float64, bool) }); ok {
		if _, ok := d.EnergyJoules(); ok {
			return energy{func() []float64 {
				v, _ := d.EnergyJoules()
				return []float64{v}
			}, []float64{0}}
		}
		return energy{}
	}
	return rapl("/sys/class/powercap")
}

// rapl finds the packages' counters under root; sub-zones (cores, memory) are parts of
// them.
func rapl(root string) energy {
	zones, _ := filepath.Glob(filepath.Join(root, "intel-rapl:[0-9]*"))
	var files []string
	var wrap []float64
	for _, z := range zones {
		if strings.Count(filepath.Base(z), ":") != 1 {
			continue
		}
		name, _ := os.ReadFile(filepath.Join(z, "name"))
		if !strings.HasPrefix(string(name), "package") {
			continue
		}
		if _, ok := microjoules(filepath.Join(z, "energy_uj")); !ok {
			return energy{} // half a machine's energy is no figure
		}
		most, _ := microjoules(filepath.Join(z, "max_energy_range_uj"))
		files, wrap = append(files, filepath.Join(z, "energy_uj")), append(wrap, most)
	}
	if len(files) == 0 {
		return energy{}
	}
	return energy{func() []float64 {
		v := make([]float64, len(files))
		for i, f := range files {
			v[i], _ = microjoules(f)
		}
		return v
	}, wrap}
}

func microjoules(path string) (float64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
	return v / 1e6, err == nil
}

// start begins a measurement; the function it returns ends it with the joules used, 0
// where nothing counts.
func (e energy) start() func() float64 {
	if e.read == nil {
		return func() float64 { return 0 }
	}
	before := e.read()
	return func() float64 {
		sum := 0.0
		for i, v := range e.read() {
			d := v - before[i]
			if d < 0 {
				d += e.wrap[i]
			}
			sum += max(d, 0)
		}
		return sum
	}
}

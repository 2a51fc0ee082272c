package bench

import (
	"context"
	"fmt"
	"runtime/debug"

	"margo/engine"
)

// Unit is a case with the sides that do it.
type Unit struct {
	Case  Case
	Sides []Side
}

// Compare warms every side up and lets them take turns, reps times: the sides of a
// unit, and the units too. The order within a turn alternates, so that no side always
// runs on a machine that another has just heated. Rows are in the order of units and
// sides.
func Compare(ctx context.Context, units []Unit, reps int, log func(string)) ([]Row, error) {
	type turn struct {
		unit   Unit
		side   Side
		memory memoryMeter
		joules energy
	}
	debug.FreeOSMemory() // what earlier cases left
	var turns []turn
	var rows []Row // of each turn
	for _, u := range units {
		for _, s := range u.Sides {
			log(fmt.Sprintf("%s: %s warms up", u.Case.Label(), s.Name()))
			m := meter(s)
			m.reset()
			if err := s.Warm(ctx, u.Case); err != nil {
				return nil, named(s, err)
			}
			rows = append(rows, Row{Case: u.Case, Side: s.Name()})
			turns = append(turns, turn{u, s, m, energyOf(deviceOf(s))})
		}
	}
	for rep := range reps {
		for j := range turns {
			i := j
			if rep%2 == 1 {
				i = len(turns) - 1 - j
			}
			t := turns[i]
			if err := ctx.Err(); err != nil {
				return nil, engine.Errorf("bench", engine.Cancelled, "%w", err)
			}
			beat := newPulse(t.side, t.unit.Case)
			beat.probe(pulseEnds)
			used := t.joules.start()
			r, err := t.side.Run(ctx, t.unit.Case, beat.between)
			if err != nil {
				return nil, named(t.side, err)
			}
			r.Joules = used() * scale(t.unit.Case)
			beat.probe(pulseEnds)
			r.PeakThen = beat.mean()
			log(fmt.Sprintf("%s: run %d of %d, %s: %.4g s/image", t.unit.Case.Label(), rep+1, reps, t.side.Name(), r.Seconds/float64(t.unit.Case.Batch)))
			rows[i].Runs = append(rows[i].Runs, r)
		}
	}
	if len(units) == 1 { // of several, each holds the others' memory too
		for i, t := range turns {
			rows[i].MemoryBytes, rows[i].DeviceMemory = t.memory.peak()
		}
	}
	return rows, nil
}

// named says which side failed, unless it is margo itself.
func named(s Side, err error) error {
	if _, ok := s.(*Margo); ok {
		return err
	}
	return fmt.Errorf("%s: %w", s.Name(), err)
}

// deviceOf is the device that a side computes on, nil if it is not known.
func deviceOf(s Side) engine.Device {
	switch s := s.(type) {
	case *Margo:
		return s.Device
	case *PyTorch:
		return s.Device
	}
	return nil
}
